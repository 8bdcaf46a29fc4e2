// SPDX-License-Identifier: Apache-2.0
// A conversation whose state an engine holds between requests: it can be forked, taken back, saved and loaded.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "core/runtime/engine.h"

namespace xgdn {

/// Tokens, and a pin on the longest prefix of them whose state the engine's prefix cache has: after all but the last
/// token of a reply with replay states, else at the end of the last prompt's whole chunks. What is not held is computed
/// again by the next request, so whatever a session does, its replies are those to its tokens alone.
///
/// For one thread at a time; the engine may serve others meanwhile and must outlive the session. A session holds at
/// most one of the engine's prefix_cache_slots, which its forks share until they go on. Other prefixes do not take it;
/// sequences that run, and find no other blocks for their keys and values, do.
class Session {
 public:
  /// Without tokens. Throws RequestError for an engine without prefix_cache_slots.
  explicit Session(Engine& engine);
  /// The other one is left without an engine.
  Session(Session&& other) noexcept;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  Session& operator=(Session&&) = delete;
  ~Session();

  /// Appends the tokens of `request.prompt`, at least one unless the session has some, and what follows them. Throws
  /// as Engine::generate, and RequestError for n other than 1; the session is as it was then.
  GenerationResult generate(Request request, const GenerateOptions& options = {});

  /// Makes these its tokens, whatever they were: for those who run the requests themselves and stream them, with what a
  /// request has computed. Throws RangeError for a token outside the vocabulary.
  void set_tokens(std::vector<int32_t> tokens);

  /// Another session with the same tokens and the same state.
  Session fork() const;

  /// Takes back the tokens behind the first num_tokens; goes on from the longest prefix of the rest that is held. With
  /// replay states that is near the end of the last reply: fewer than 16 tokens are computed again, unless they were
  /// drafted.
  /// Throws RangeError for more tokens than there are.
  void truncate(int64_t num_tokens);

  /// Writes tokens and state to a file, which is complete or not there. Throws CheckpointError when it cannot.
  void save(const std::filesystem::path& path) const;
  /// A session from a file, of the same model on whatever machine or backend. Throws as the constructor,
  /// CheckpointError for a file that is damaged or of another model, OutOfSlots and OutOfBlocks where its state has no
  /// room.
  static Session load(Engine& engine, const std::filesystem::path& path);

  /// So far.
  const std::vector<int32_t>& tokens() const { return tokens_; }
  /// Of these, the first whose state is held.
  int64_t num_kept() const { return engine_->num_pinned(pinned_); }

 private:
  void go_on_from(std::vector<int32_t> tokens);

  Engine* engine_;
  std::vector<int32_t> tokens_;
  int64_t pinned_ = 0;  // a prefix; 0: none
};

}  // namespace xgdn
