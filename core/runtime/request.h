// SPDX-License-Identifier: Apache-2.0
// What callers hand to the engine and get back from it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/runtime/grammar.h"
#include "core/runtime/logprobs.h"
#include "core/runtime/sampling_params.h"

namespace xgdn {

/// Counts from 1; no two requests of an engine share one.
using RequestId = int64_t;

/// A prompt, and how to go on from it.
struct Request {
  std::vector<int32_t> prompt;  // token ids, at least one
  int64_t max_new_tokens = 16;  // 0: the prompt is computed, and no more
  SamplingParams sampling = {};
  std::vector<int32_t> stop_token_ids = {};  // beside the model's own end-of-sequence tokens
  bool ignore_eos = false;                   // true: the model's own do not stop the request
  int64_t n = 1;  // replies: branches that share the prompt's computation, branch i with the seed sampling.seed + i
  std::shared_ptr<const Grammar> grammar = {};  // of every reply; null: any text. Such a sequence gets no drafts

  /// Report for each token of the prompt but the first how likely it was, and as many of its likeliest rivals, 0..20.
  /// The prompt is computed from its beginning, whatever is cached of it.
  std::optional<int64_t> prompt_logprobs = {};
  bool wants_hidden = false;  // report the hidden state of the prompt's last token

  /// Keep in the prefix cache the state at the reply's last multiple of 16 tokens as well, so that those who take back
  /// its last tokens compute fewer than that again. Of replay states; no copy is made for it, and no other reply comes.
  bool is_rewindable = false;
};

/// Why a request, or a branch of it, got its last token.
enum class FinishReason {
  kRunning,    // not finished
  kStop,       // a stop token was chosen; it is the last token
  kLength,     // max_new_tokens are there
  kCancelled,  // by cancel()
  kError,      // see `error`
};

/// What one step did for one request, or for one branch of it.
struct RequestEvent {
  RequestId id = 0;
  std::vector<int32_t> tokens;  // new ones; none while the prompt is computed
  int64_t num_prefilled = 0;    // prompt tokens in the state so far
  int64_t prompt_size = 0;
  FinishReason finish_reason = FinishReason::kRunning;
  std::string error;                      // with kError
  bool is_spoilt = false;                 // with kError: the request's state or logits were not finite
  std::vector<Logprobs> logprobs;         // of each new token, where sampling.logprobs asks for them
  int64_t branch = 0;                     // of n; while the prompt is computed, the branch that computes it
  int64_t num_cached = 0;                 // prompt tokens whose state the prefix cache had
  std::vector<Logprobs> prompt_logprobs;  // of the prompt's tokens that follow those that earlier events had; where n
                                          // branches share a prompt, events of those that compute it have them
  std::vector<float> hidden;              // behind the last norm [hidden], of the prompt's last token; as above
};

/// A finished request, or one branch of it.
struct GenerationResult {
  RequestId id = 0;
  std::vector<int32_t> tokens;  // without the prompt
  FinishReason finish_reason = FinishReason::kRunning;
  std::string error;                      // with kError
  std::vector<Logprobs> logprobs;         // of each token, where sampling.logprobs asks for them
  int64_t branch = 0;                     // of n
  int64_t num_cached = 0;                 // prompt tokens whose state the prefix cache had
  std::vector<Logprobs> prompt_logprobs;  // of its tokens but the first, where the request asks; on the first branch
  std::vector<float> hidden;              // of its last token, where the request asks; on the first branch
};

}  // namespace xgdn
