// SPDX-License-Identifier: Apache-2.0
// The gated delta rule: decode, verification and prefill on a pool of states, its gates, and a layer's decode step.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"
#include "core/kernels/ops/replay.h"

namespace xgdn::kernel {

/// Advances each sequence's state token by token and reads it out: decode, and (with num_accepted) draft verification.
///
/// Decode: sequence n reads slot state_indices[n] and, after its last token, writes write_indices[n].
/// Verification: state_indices is a table [N, L]; sequence n of at most L tokens reads table[n, num_accepted[n] - 1]
/// and writes table[n, t] after token t. A read slot of kPadSlot skips the sequence; a write slot of kPadSlot computes
/// the outputs and writes nothing.
struct RecurrentGatedDeltaRuleParams {
  at::Tensor q;              // [T, H, K]      f32 | bf16 | f16, strided
  at::Tensor k;              // [T, H, K]      as q, strided
  at::Tensor v;              // [T, HV, V]     as q, strided
  at::Tensor g;              // [T, HV]        f32, natural log of the decay, <= 0, strided
  at::Tensor beta;           // [T, HV]        f32 | as q, after the sigmoid, strided
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor cu_seqlens;     // [N+1]          i32
  at::Tensor state_indices;  // [N] | [N, L]   i32
  at::Tensor out;            // [T, HV, V]     f32 | as q, strided, written
  std::optional<at::Tensor> write_indices = {};  // [N]  i32; default state_indices; not with num_accepted
  std::optional<at::Tensor> num_accepted = {};   // [N]  i32, 1..L; makes the call a verification
  HostFacts host = {};                           // cu_seqlens is for backends whose kernels limit lengths
  std::optional<double> scale = {};              // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  std::string backend = "auto";
};
void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p);
void check_indices(const RecurrentGatedDeltaRuleParams& p);

/// recurrent_gated_delta_rule with the backend of that name; throws UnsupportedError where it cannot run.
void npu_recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p);

/// Varlen prefill: initial states are read from the pool, final states written to it. Needs the step's chunk metadata
/// for C = 64 (build_chunk_metadata); never recomputes it.
struct ChunkGatedDeltaRuleParams {
  at::Tensor q;              // [T, H, K]      f32 | bf16 | f16, strided
  at::Tensor k;              // [T, H, K]      as q, strided
  at::Tensor v;              // [T, HV, V]     as q, strided
  at::Tensor g;              // [T, HV]        f32, <= 0, strided
  at::Tensor beta;           // [T, HV]        f32 | as q, strided
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor cu_seqlens;     // [N+1]          i32
  at::Tensor state_indices;  // [N]            i32
  at::Tensor chunk_indices;  // [M, 2]         i32, ChunkMetadata::chunk_indices_chunk64
  at::Tensor chunk_offsets;  // [N+1]          i32, ChunkMetadata::chunk_offsets_chunk64
  at::Tensor out;            // [T, HV, V]     f32 | as q, strided, written
  std::optional<at::Tensor> has_initial_state = {};  // [N] bool; false: start from zero; default all true
  std::optional<at::Tensor> write_indices = {};      // [N]  i32; default state_indices
  HostFacts host = {};                               // cu_seqlens is for backends whose kernels limit lengths
  std::optional<double> scale = {};                  // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  // "fast" may multiply sums of two bf16 numbers, with f32 sums, and rounds q and k to bf16; "exact" is f32 throughout;
  // "auto" is fast for bf16 inputs and exact for others. A backend may be more exact than asked.
  std::string accuracy = "auto";
  std::string backend = "auto";
};
void chunk_gated_delta_rule(const ChunkGatedDeltaRuleParams& p);
void check_indices(const ChunkGatedDeltaRuleParams& p);

/// Throws UnsupportedError unless `accuracy` is one of ChunkGatedDeltaRuleParams. `of`: the op, or what else was given
/// it, and the argument's name.
void check_accuracy_name(std::string_view of, std::string_view arg, const std::string& accuracy);

/// One token per sequence straight from the conv output and the raw gates: gating, l2norm and recurrence in one kernel.
/// H follows from the widths: row of mixed_qkv = [q: H K | k: H K | v: HV V].
struct PackedDecodeParams {
  at::Tensor mixed_qkv;      // [N, 2HK+HVV]   f32 | bf16 | f16, strided
  at::Tensor a;              // [N, HV]        as mixed_qkv, strided
  at::Tensor b;              // [N, HV]        as mixed_qkv, strided
  at::Tensor A_log;          // [HV]           f32 | as mixed_qkv
  at::Tensor dt_bias;        // [HV]           f32 | as mixed_qkv
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor state_indices;  // [N]            i32
  at::Tensor out;            // [N, HV, V]     f32 | as mixed_qkv, strided, written
  std::optional<at::Tensor> write_indices = {};  // [N]  i32; default state_indices
  HostFacts host = {};
  std::optional<double> scale = {};  // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  std::string backend = "auto";
};
void packed_decode(const PackedDecodeParams& p);
void check_indices(const PackedDecodeParams& p);

/// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), computed in fp32.
struct GdnGatingParams {
  at::Tensor a;        // [T, HV]  f32 | bf16 | f16, strided
  at::Tensor b;        // [T, HV]  as a, strided
  at::Tensor A_log;    // [HV]     f32 | as a
  at::Tensor dt_bias;  // [HV]     f32 | as a
  at::Tensor g;        // [T, HV]  f32, written
  at::Tensor beta;     // [T, HV]  f32, written
  std::string backend = "auto";
};
void gdn_gating(const GdnGatingParams& p);

/// The slots of one pool that each sequence reads and writes.
struct SlotIndices {
  at::Tensor read;                       // [N]  i32
  std::optional<at::Tensor> write = {};  // [N]  i32; default read
};

/// A layer's decode step between its two projections: causal_conv1d_update, packed_decode and rms_norm_gated, one token
/// per sequence. Row of projected = [q: H K | k: H K | v: HV V | z: HV V | b: HV | a: HV]; D = 2HK+HVV.
///
/// With a ring, on replay states: gdn_gating and replay_gated_delta_rule in place of packed_decode, with the bits that
/// they give one after the other on backends that promise them. A sequence's ring has the slot of its convolution; the
/// checkpoint is written, and may be shared, as ReplayGatedDeltaRuleParams says.
struct GdnDecodeStepParams {
  at::Tensor projected;      // [N, D+HVV+2HV]  f32 | bf16 | f16, strided
  at::Tensor conv_weight;    // [D, W]          as projected, W = 2..4, tap W-1 is the current token
  at::Tensor conv_state;     // [S, R, D]       as projected | f32, R >= W-1, oldest row first, updated in place
  at::Tensor A_log;          // [HV]            f32 | as projected
  at::Tensor dt_bias;        // [HV]            f32 | as projected
  at::Tensor state;          // [S, HV, V, K]   f32 | bf16, updated in place; a slot is contiguous, the slot stride free
  at::Tensor norm_weight;    // [V]             f32 | as projected
  at::Tensor state_indices;  // [N]             i32
  at::Tensor out;            // [N, HV, V]      as projected, strided, written
  std::optional<at::Tensor> conv_bias = {};      // [D]    as projected
  std::optional<at::Tensor> write_indices = {};  // [N]    i32; default state_indices
  std::optional<SlotIndices> conv_slots = {};    // of conv_state and ring; default those of the state
  std::optional<ReplayRing> ring = {};           // updated in place
  int64_t chunk_size = 16;                       // C, beside ring: 16, 32 or 64
  std::optional<at::Tensor> cu_seqlens =
      {};  // [N+1]  i32, 0, 1, ..., N; spares a backend that composes the step to make it
  HostFacts host = {};
  double norm_eps = 1e-6;
  std::optional<double> scale = {};  // default K^-0.5
  std::string backend = "auto";
};
void gdn_decode_step(const GdnDecodeStepParams& p);

/// p.conv_slots with its default.
inline SlotIndices conv_slots_of(const GdnDecodeStepParams& p) {
  return p.conv_slots.value_or(SlotIndices{p.state_indices, p.write_indices});
}
void check_indices(const GdnDecodeStepParams& p);

}  // namespace xgdn::kernel
