// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on checkpoints and rings, on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Rings of a pool, f32: the tokens of a sequence since its checkpoint.
struct RingView {
  float* k = nullptr;         // [S, H, R, K]   normalised
  float* u = nullptr;         // [S, HV, R, V]
  float* g = nullptr;         // [S, HV, R]
  int32_t* length = nullptr;  // [S]
  int64_t R = 0;
  int64_t k_stride = 0, u_stride = 0, g_stride = 0;  // from slot to slot
  const int32_t* read = nullptr;                     // [N]
  const int32_t* write = nullptr;                    // [N]  negative: nothing of the sequence is written

  float* keys(int32_t slot, int64_t key_head, int64_t K) const { return k + slot * k_stride + key_head * R * K; }
  float* updates(int32_t slot, int64_t head, int64_t V) const { return u + slot * u_stride + head * R * V; }
  float* gates(int32_t slot, int64_t head) const { return g + slot * g_stride + head * R; }
};

/// K and V are multiples of 16, at most kMaxHeadDim.
struct ReplayGatedDeltaRuleArgs : DeltaRuleArgs {
  RingView ring;
  const int32_t* num_accepted = nullptr;    // [N]  null: 0
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  int64_t C = 0;
  bool commit = true;
};

/// Whether anything of sequence n is written.
inline bool is_written(const ReplayGatedDeltaRuleArgs& args, int64_t n) {
  return args.state.read[n] >= 0 && args.state.write[n] >= 0 && args.ring.write[n] >= 0;
}

/// Tokens of sequence n in its ring when the call begins.
int64_t first_length(const ReplayGatedDeltaRuleArgs& args, int64_t n);

/// Work items are (sequence, key head), heads fastest; any thread may take any of them in any order.
inline int64_t num_work_items(const ReplayGatedDeltaRuleArgs& args) {
  return args.N * args.H;
}

void replay_gated_delta_rule(const ReplayGatedDeltaRuleArgs& args, int64_t begin, int64_t end);

/// When all items are done: they read the lengths.
void write_ring_lengths(const ReplayGatedDeltaRuleArgs& args);

/// Writes the plain states after the first lengths[n] <= R tokens of the rings. Needs sizes, state and ring alone.
void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
