// SPDX-License-Identifier: Apache-2.0
// The logits of a step whose vocabulary several ranks share: what of them a sampler needs goes to rank 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "core/runtime/process_group.h"
#include "core/runtime/request.h"

namespace xgdn {

/// How many of each rank's likeliest tokens decide what a request's sampler chooses: 1 where it is greedy, top_k where
/// it draws from so few. 0: the whole row does, because rules of the request (grammar, penalties, biases, words,
/// min_tokens) may change any logit, because log-probabilities are of all tokens, or because it draws from all, or from
/// more than 256.
int64_t num_candidates(const Request& request);

/// A step's logits as rank 0 has them.
class ShardedLogits {
 public:
  /// Exchanges, on all ranks alike, what the rows need. local [R, vocab / world] f32: the rank's part; needs [R]: of
  /// each row, as num_candidates(). Throws RankError.
  ShardedLogits(const at::Tensor& local, const std::vector<int64_t>& needs, ProcessGroup& group);

  /// Waits for what came, on the host. For rank 0.
  void to_host();

  /// A row with minus infinity for what is no candidate, in `memory` where it is not whole: a sampler of that need
  /// chooses from it as from the whole one. Equal logits are all candidates, or those of the lowest tokens.
  std::span<const float> row(int64_t row, std::vector<float>& memory) const;
  /// The first of the largest, of a row with candidates. Throws NumericsError as check_largest_logit.
  int32_t largest(int64_t row) const;

 private:
  std::span<const float> candidates(int64_t row, int64_t rank) const;
  std::span<const int32_t> tokens(int64_t row, int64_t rank) const;

  int64_t part_;                 // tokens of a rank
  int64_t num_candidates_ = 0;   // of a row and a rank
  std::vector<int64_t> places_;  // of each row among those of its kind
  std::vector<bool> is_whole_;   // of each row
  at::Tensor whole_;             // [world, n, part], on the host [n, vocab] f32
  at::Tensor candidates_;        // [world, n, 2, C] i32  bits of the logits, and the rank's tokens
};

/// The whole rows [R, vocab] f32 of the ranks' parts [R, vocab / world], on every rank's device. Throws RankError.
at::Tensor gather_logits(const at::Tensor& local, ProcessGroup& group);

}  // namespace xgdn
