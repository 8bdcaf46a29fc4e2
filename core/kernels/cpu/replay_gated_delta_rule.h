// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on checkpoints and rings, on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

/// Whether anything of sequence n is written.
inline bool is_written(const ReplayGatedDeltaRuleArgs& args, int64_t n) {
  return args.state.read[n] >= 0 && args.state.write[n] >= 0 && args.ring.write[n] >= 0;
}

/// The first token of sequence n in the call.
inline int64_t token_begin(const ReplayGatedDeltaRuleArgs& args, int64_t n) {
  return args.cu_seqlens == nullptr ? n : args.cu_seqlens[n];
}

/// Tokens of sequence n in the call.
inline int64_t num_tokens(const ReplayGatedDeltaRuleArgs& args, int64_t n) {
  return args.cu_seqlens == nullptr ? 1 : args.cu_seqlens[n + 1] - args.cu_seqlens[n];
}

/// Tokens of sequence n in its ring when the call begins.
int64_t first_length(const ReplayGatedDeltaRuleArgs& args, int64_t n);

/// Work items are (sequence, key head), heads fastest; any thread may take any of them in any order.
inline int64_t num_work_items(const ReplayGatedDeltaRuleArgs& args) {
  return args.N * args.H;
}

/// K and V are multiples of 16, at most kMaxHeadDim.
void replay_gated_delta_rule(const ReplayGatedDeltaRuleArgs& args, int64_t begin, int64_t end);

/// When all items are done: they read the lengths.
void write_ring_lengths(const ReplayGatedDeltaRuleArgs& args);

/// Writes the plain states after the first lengths[n] <= R tokens of the rings. Needs sizes, state and ring alone.
void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
