// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/session.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <utility>

#include "core/runtime/session_file.h"

namespace xgdn {

Session::Session(Engine& engine) : engine_(&engine) {
  if (engine.prefix_cache_slots() > 0) return;
  throw RequestError("[Session] engine: expected one with prefix_cache_slots, got 0 of them");
}

Session::Session(Session&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      tokens_(std::move(other.tokens_)),
      pinned_(std::exchange(other.pinned_, 0)) {}

Session::~Session() {
  if (engine_ != nullptr) engine_->unpin(pinned_);
}

// The prefix that was held so far stays until the new one is.
void Session::go_on_from(std::vector<int32_t> tokens) {
  tokens_ = std::move(tokens);
  engine_->unpin(std::exchange(pinned_, engine_->pin(tokens_)));
}

GenerationResult Session::generate(Request request, const GenerateOptions& options) {
  if (request.n != 1) throw RequestError(c10::str("[Session] n: expected 1, got ", request.n));
  request.is_rewindable = true;
  request.prompt.insert(request.prompt.begin(), tokens_.begin(), tokens_.end());
  GenerationResult result = engine_->generate({request}, options).at(0);
  std::vector<int32_t> tokens = std::move(request.prompt);
  tokens.insert(tokens.end(), result.tokens.begin(), result.tokens.end());
  go_on_from(std::move(tokens));
  return result;
}

void Session::set_tokens(std::vector<int32_t> tokens) {
  const int64_t vocab = engine_->config().vocab_size;
  for (const int32_t token : tokens) {
    if (token >= 0 && token < vocab) continue;
    throw RangeError(c10::str("[Session] set_tokens: expected token ids 0..", vocab - 1, ", got ", token));
  }
  go_on_from(std::move(tokens));
}

Session Session::fork() const {
  Session forked(*engine_);
  forked.go_on_from(tokens_);
  return forked;
}

void Session::truncate(int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens > std::ssize(tokens_)) {
    throw RangeError(c10::str("[Session] truncate: expected 0..", tokens_.size(), " tokens, got ", num_tokens));
  }
  go_on_from({tokens_.begin(), tokens_.begin() + num_tokens});
}

void Session::save(const std::filesystem::path& path) const {
  const c10::InferenceMode inference;
  SavedSession saved{.tokens = tokens_};
  engine_->copy_state(pinned_, saved);
  write_session(path, saved, engine_->session_specs());
}

Session Session::load(Engine& engine, const std::filesystem::path& path) {
  const c10::InferenceMode inference;
  Session loaded(engine);
  SavedSession saved = read_session(path, engine.session_specs());
  if (saved.num_kept > 0) engine.adopt(saved);
  loaded.go_on_from(std::move(saved.tokens));
  return loaded;
}

}  // namespace xgdn
