// SPDX-License-Identifier: Apache-2.0
// What of a step's logits the samplers want comes to the host, where a copy of all costs more: of those on a device,
// and of several ranks that share a vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/runtime/host_copy.h"
#include "core/runtime/process_group.h"
#include "core/runtime/request.h"

namespace xgdn {

/// How many of the likeliest tokens, of several ranks of each, decide what a request's sampler chooses: 1 where it is
/// greedy, top_k where it draws from so few. 0: the whole row does, because rules of the request (grammar, penalties,
/// biases, words, min_tokens) may change any logit, because log-probabilities are of all tokens, or because it draws
/// from all, or from more than 256.
int64_t num_candidates(const Request& request);

/// Of a row that nobody wants.
inline constexpr int64_t kNotWanted = -1;

/// A step's logits as the one process has them, or rank 0.
class WantedLogits {
 public:
  /// Finds what the rows need, and exchanges it on all ranks alike; `group` null: there is one. local [R, vocab /
  /// world] f32: the rank's part; needs [R]: of each row, as num_candidates(), or kNotWanted. Throws RankError.
  WantedLogits(const at::Tensor& local, const std::vector<int64_t>& needs, ProcessGroup* group);

  /// Whether the row is wanted.
  bool has(int64_t row) const { return places_.at(static_cast<size_t>(row)) >= 0; }

  /// Starts to bring it to the host, while a device of which that is one goes on.
  void start_to_host();
  /// Waits until it is on the host. For rank 0.
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
  std::vector<int64_t> places_;  // of each row among those of its kind; -1: not wanted
  std::vector<bool> is_whole_;   // of each row
  at::Tensor whole_;             // [world, n, part], on the host [n, vocab] f32
  at::Tensor candidates_;        // [world, n, 2, C] i32  bits of the logits, and the rank's tokens
  std::optional<HostCopy> whole_on_its_way_, candidates_on_their_way_;
};

/// The whole rows [R, vocab] f32 of the ranks' parts [R, vocab / world], on every rank's device. Throws RankError.
at::Tensor gather_logits(const at::Tensor& local, ProcessGroup& group);

}  // namespace xgdn
