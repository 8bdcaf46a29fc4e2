// SPDX-License-Identifier: Apache-2.0
// What kernels of single ops take, whichever processor they are for. Letters as in core/kernels/ops.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel {

/// The delta rule token by token. cu_seqlens may be null: one token a sequence.
struct TokenDeltaRuleArgs : DeltaRuleArgs {
  // With A_log, g and beta are the logits a and b.
  InRows A_log;    // [HV]  no data: g and beta are given
  InRows dt_bias;  // [HV]  beside A_log

  // Verification: state.read is a table [N, L], state.write is unused.
  const int32_t* num_accepted = nullptr;  // [N]  null: no verification
  int64_t L = 1;
};

/// Pools of rings, f32: the tokens of a sequence since its checkpoint. A slot is contiguous.
struct RingView {
  float* k = nullptr;         // [S, H, R, K]   normalised
  float* u = nullptr;         // [S, HV, R, V]
  float* g = nullptr;         // [S, HV, R]
  int32_t* length = nullptr;  // [S]
  int64_t R = 0;
  int64_t k_stride = 0, u_stride = 0, g_stride = 0;  // from slot to slot
  const int32_t* read = nullptr;                     // [N]
  const int32_t* write = nullptr;                    // [N]  negative: nothing of the sequence is written

  constexpr float* keys(int32_t slot, int64_t key_head, int64_t K) const {
    return k + slot * k_stride + key_head * R * K;
  }
  constexpr float* updates(int32_t slot, int64_t head, int64_t V) const { return u + slot * u_stride + head * R * V; }
  constexpr float* gates(int32_t slot, int64_t head) const { return g + slot * g_stride + head * R; }
};

/// The delta rule on replay states. To make them plain takes sizes, state and ring alone. cu_seqlens may be null: one
/// token a sequence.
struct ReplayGatedDeltaRuleArgs : DeltaRuleArgs {
  RingView ring;
  const int32_t* num_accepted = nullptr;    // [N]  null: 0
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  int64_t C = 0;
  bool commit = true;
};

struct CausalConv1dArgs {
  int64_t N = 0;
  int64_t D = 0;
  int64_t W = 0;  // 2..4
  int64_t R = 0;

  InRows x;                      // [T, D]
  OutRows out;                   // [T, D]
  const void* weight = nullptr;  // [D, W]     as x
  const void* bias = nullptr;    // [D]        as x; null: none
  bool silu = true;

  SlotView conv_state;  // [S, R, D]

  const int32_t* cu_seqlens = nullptr;      // [N+1]
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  const int32_t* num_accepted = nullptr;    // [N]  null: history starts at row 0
  bool is_update = false;                   // keep every input, so that any acceptance count can be resumed
};

struct GdnGatingArgs {
  int64_t HV = 0;
  InRows a;        // [T, HV]
  InRows b;        // [T, HV]
  InRows A_log;    // [HV]
  InRows dt_bias;  // [HV]
  OutRows g;       // [T, HV]
  OutRows beta;    // [T, HV]
};

struct RmsNormGatedArgs {
  int64_t HV = 0;
  int64_t V = 0;
  InRows x;       // [T, HV, V]
  InRows z;       // [T, HV, V]
  InRows weight;  // [V]
  OutRows out;    // [T, HV, V]
  float eps = 0;
};

/// The ops that a decode step consists of. What one hands to the next is not in memory: conv.out, rule.q, rule.k,
/// rule.v and norm.x are absent, of rule.out only the type counts, to which o is rounded.
struct DecodeStepArgs {
  CausalConv1dArgs conv;    // one token a sequence
  TokenDeltaRuleArgs rule;  // with A_log: g and beta are logits
  RmsNormGatedArgs norm;
  RingView ring;  // of replay states; no data: plain ones
  int64_t C = 0;  // beside ring

  bool has_replay_states() const { return ring.k != nullptr; }
};

/// The rule of a step on replay states. Its tokens are not in memory.
inline ReplayGatedDeltaRuleArgs replay_args(const DecodeStepArgs& step) {
  ReplayGatedDeltaRuleArgs args = {step.rule};
  args.ring = step.ring;
  args.C = step.C;
  return args;
}

struct RmsNormArgs {
  int64_t H = 0;
  int64_t D = 0;
  int64_t P = 0;         // dimensions that are rotated
  InRows x;              // [T, H, D]
  InRows weight;         // [D]
  InRows residual;       // [T, H, D]  data may be null
  OutRows residual_out;  // [T, H, D]  beside residual; it may be the same memory
  InRows cos;            // [T, P]
  InRows sin;            // [T, P]
  OutRows out;           // [T, H, D]
  float eps = 0;
};

struct SiluAndMulArgs {
  int64_t I = 0;
  InRows gate;  // [T, I]
  InRows up;    // [T, I]
  OutRows out;  // [T, I]
};

struct SigmoidAndMulArgs {
  int64_t H = 0;
  int64_t D = 0;
  InRows x;     // [T, H, D]
  InRows gate;  // [T, H, D]
  OutRows out;  // [T, H, D]
};

}  // namespace xgdn::kernel
