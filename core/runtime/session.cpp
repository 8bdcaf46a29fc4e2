// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/session.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <utility>

#include "core/runtime/session_file.h"

namespace xgdn {

Session::Session(Engine& engine) : Session(engine, {}) {}

Session::Session(Engine& engine, std::vector<int32_t> tokens) : engine_(&engine), tokens_(std::move(tokens)) {
  if (engine.prefix_cache_slots() == 0) {
    throw RequestError("[Session] engine: expected one with prefix_cache_slots, got 0 of them");
  }
  pin();
}

Session::Session(Session&& other) noexcept
    : engine_(std::exchange(other.engine_, nullptr)),
      tokens_(std::move(other.tokens_)),
      pinned_(std::exchange(other.pinned_, 0)) {}

Session::~Session() {
  if (engine_ != nullptr) engine_->unpin(pinned_);
}

// The prefix that was held so far stays until the new one is.
void Session::pin() {
  engine_->unpin(std::exchange(pinned_, engine_->pin(tokens_)));
}

GenerationResult Session::generate(Request request, const GenerateOptions& options) {
  if (request.n != 1) throw RequestError(c10::str("[Session] n: expected 1, got ", request.n));
  request.prompt.insert(request.prompt.begin(), tokens_.begin(), tokens_.end());
  GenerationResult result = engine_->generate({request}, options).at(0);
  tokens_ = std::move(request.prompt);
  tokens_.insert(tokens_.end(), result.tokens.begin(), result.tokens.end());
  pin();
  return result;
}

Session Session::fork() const {
  return Session(*engine_, tokens_);
}

void Session::truncate(int64_t num_tokens) {
  if (num_tokens < 0 || num_tokens > std::ssize(tokens_)) {
    throw RangeError(c10::str("[Session] truncate: expected 0..", tokens_.size(), " tokens, got ", num_tokens));
  }
  tokens_.resize(static_cast<size_t>(num_tokens));
  pin();
}

void Session::save(const std::filesystem::path& path) const {
  const c10::InferenceMode inference;
  SavedSession saved{.tokens = tokens_};
  engine_->copy_state(pinned_, saved);
  write_session(path, saved, engine_->session_specs());
}

Session Session::load(Engine& engine, const std::filesystem::path& path) {
  const c10::InferenceMode inference;
  SavedSession saved = read_session(path, engine.session_specs());
  if (saved.num_kept > 0) engine.adopt(saved);
  return Session(engine, std::move(saved.tokens));
}

}  // namespace xgdn
