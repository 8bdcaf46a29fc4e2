// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on replay states: a checkpoint, and the tokens since then.
//
// S is formed after every C-th token of a sequence, counted from its first. The tokens behind the last such fold stand
// in a ring: their normalised keys k, what they write u = beta (v - alpha S k), and their gates g, all in f32, so that
// nothing is lost. A token reads S and the ring and appends a row; S is written by a fold alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// Pools of rings of R rows, C of them for committed tokens and up to C more for drafts. Slots apart from those of the
/// checkpoints, so that forks share the one and own the other. A slot is contiguous, the slot stride free.
struct ReplayRing {
  at::Tensor k;       // [B, H, R, K]   f32
  at::Tensor u;       // [B, HV, R, V]  f32
  at::Tensor g;       // [B, HV, R]     f32
  at::Tensor length;  // [B]            i32, committed tokens, 0..C-1
};

/// Advances each sequence by its tokens: decode, verification of drafts and prefill alike. A token's output, and all
/// that is written, has the same bits however a sequence is cut into calls, on backends that promise it, as long as
/// `accuracy` is "exact".
///
/// Sequence n reads the checkpoint state_indices[n] and the ring ring_indices[n]; afterwards write_indices[n] and
/// ring_write_indices[n] hold them. The ring grows by the tokens; each time it has C committed ones they are folded
/// into the checkpoint. One that stays in its slot is written by a fold alone, and by a sequence that starts from zero:
/// forks may share a slot until they fold. A state slot of kPadSlot skips the sequence; a write slot of kPadSlot
/// computes the outputs and writes nothing. Drafts: with commit = false the call's tokens are left behind the ring's
/// length. The next call of the sequence says by num_accepted how many of them count, the others are gone.
///
/// Infinity and NaN in a state are seen in the outputs, in that value head: those of the tokens that read it, and where
/// a fold of committed tokens forms them, NaN as that of the last of them. So nobody need look at the states
/// themselves.
struct ReplayGatedDeltaRuleParams {
  at::Tensor q;              // [T, H, K]      f32 | bf16 | f16, strided
  at::Tensor k;              // [T, H, K]      as q, strided
  at::Tensor v;              // [T, HV, V]     as q, strided
  at::Tensor g;              // [T, HV]        f32, natural log of the decay, <= 0, strided
  at::Tensor beta;           // [T, HV]        f32 | as q, after the sigmoid, strided
  at::Tensor state;          // [S, HV, V, K]  f32 | bf16, checkpoints, updated in place; slot stride free
  ReplayRing ring;           //                updated in place
  at::Tensor cu_seqlens;     // [N+1]          i32
  at::Tensor state_indices;  // [N]            i32
  at::Tensor ring_indices;   // [N]            i32, kPadSlot exactly where state_indices is
  at::Tensor out;            // [T, HV, V]     f32 | as q, strided, written
  std::optional<at::Tensor> write_indices = {};       // [N]  i32; default state_indices
  std::optional<at::Tensor> ring_write_indices = {};  // [N]  i32; default ring_indices
  std::optional<at::Tensor> num_accepted = {};        // [N]  i32, 0..R-C; default 0
  std::optional<at::Tensor> has_initial_state = {};   // [N]  bool; false: zero and an empty ring; default all true
  HostFacts host = {};
  int64_t chunk_size = 16;           // C: 16, 32 or 64
  bool commit = true;                // false: at most R-C tokens a sequence
  std::optional<double> scale = {};  // default K^-0.5
  bool use_qk_l2norm_in_kernel = true;
  // As ChunkGatedDeltaRuleParams::accuracy, of a call that commits its tokens. With any but "exact", a backend may
  // compute the tokens up to a sequence's last fold as chunk_gated_delta_rule does: then the bits depend on how a
  // sequence is cut into calls.
  std::string accuracy = "exact";
  std::string backend = "auto";
};
void replay_gated_delta_rule(const ReplayGatedDeltaRuleParams& p);
void check_indices(const ReplayGatedDeltaRuleParams& p);

/// Writes the state after the first lengths[n] tokens of a ring as a plain one: row n reads the checkpoint
/// state_indices[n] and the ring ring_indices[n], and writes write_indices[n]. With C tokens it is the checkpoint that
/// their fold forms, bit by bit.
struct MaterializeStateParams {
  at::Tensor state;          // [S, HV, V, K]   f32 | bf16, updated in place; slot stride free
  ReplayRing ring;           //                 read; length is not
  at::Tensor lengths;        // [N]             i32, 0..C
  at::Tensor state_indices;  // [N]             i32; kPadSlot skips the row
  at::Tensor ring_indices;   // [N]             i32, kPadSlot exactly where state_indices is
  at::Tensor write_indices;  // [N]             i32; kPadSlot skips the row
  int64_t chunk_size = 16;   // C: 16, 32 or 64
  std::string backend = "auto";
};
void materialize_state(const MaterializeStateParams& p);
void check_indices(const MaterializeStateParams& p);

}  // namespace xgdn::kernel
