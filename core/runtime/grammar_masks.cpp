// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/grammar_masks.h"

#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "core/errors.h"

namespace xgdn {
namespace {

constexpr int64_t kWordBits = 32;

void check_tokens(const std::vector<int32_t>& forced, int64_t vocab_size) {
  for (const int32_t token : forced) {
    if (token >= 0 && token < vocab_size) continue;
    throw RangeError(c10::str("forced: expected token ids 0..", vocab_size - 1, ", got ", token));
  }
}

}  // namespace

struct GrammarMasks::Shared {
  std::shared_ptr<const Grammar> grammar;
  int64_t vocab_size = 0;
  std::unique_ptr<TokenMatcher> matcher;  // null: not begun
  std::vector<uint32_t> mask;
  std::vector<int32_t> forced;
  std::string error;  // empty: none

  std::mutex mutex;  // guards is_ready, which says whose turn it is with the rest
  std::condition_variable became_ready;
  bool is_ready = false;
};

GrammarMasks::GrammarMasks(std::shared_ptr<const Grammar> grammar, int64_t vocab_size)
    : shared_(std::make_shared<Shared>()) {
  shared_->grammar = std::move(grammar);
  shared_->vocab_size = vocab_size;
  shared_->mask.resize(static_cast<size_t>((vocab_size + kWordBits - 1) / kWordBits));
  launch({});
}

GrammarMasks::~GrammarMasks() = default;

void GrammarMasks::launch(std::vector<int32_t> tokens) {
  at::launch([shared = shared_, tokens = std::move(tokens)] { run(shared, tokens); });
}

void GrammarMasks::run(const std::shared_ptr<Shared>& shared, const std::vector<int32_t>& tokens) {
  try {
    if (!shared->matcher) shared->matcher = shared->grammar->matcher();
    if (!tokens.empty()) shared->matcher->accept(tokens);
    shared->matcher->write_mask(shared->mask);
    shared->forced = shared->matcher->forced();
    check_tokens(shared->forced, shared->vocab_size);
  } catch (const std::exception& error) {
    shared->error = c10::str("[Grammar] ", error.what());
  } catch (...) {  // else next() would wait for ever
    shared->error = "[Grammar] an exception without a message";
  }
  {
    const std::lock_guard lock(shared->mutex);
    shared->is_ready = true;
  }
  shared->became_ready.notify_all();
}

GrammarMasks::Next GrammarMasks::next() const {
  std::unique_lock lock(shared_->mutex);
  shared_->became_ready.wait(lock, [&] { return shared_->is_ready; });
  if (!shared_->error.empty()) throw GenerationError(shared_->error);
  return {shared_->mask, shared_->forced};
}

void GrammarMasks::accept(std::vector<int32_t> tokens) {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->is_ready = false;
  }
  launch(std::move(tokens));
}

}  // namespace xgdn
