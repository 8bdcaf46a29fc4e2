// SPDX-License-Identifier: Apache-2.0
// The causal convolution before the delta rule, on a pool of its last inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// Depthwise causal convolution with SiLU over packed sequences (prefill). Reads the W-1 rows before the sequence from
/// the conv pool where has_initial_state, else zeros; leaves the sequence's last W-1 inputs in rows 0..W-2.
struct CausalConv1dParams {
  at::Tensor x;                         // [T, D]     f32 | bf16 | f16, strided
  at::Tensor weight;                    // [D, W]     as x, W = 2..4, tap W-1 is the current token
  at::Tensor conv_state;                // [S, R, D]  as x | f32, R >= W-1, oldest row first, updated in place
  at::Tensor cu_seqlens;                // [N+1]      i32
  at::Tensor state_indices;             // [N]        i32
  at::Tensor out;                       // [T, D]     as x, strided, written
  std::optional<at::Tensor> bias = {};  // [D]  as x
  std::optional<at::Tensor> has_initial_state = {};  // [N]  bool; default all true
  std::optional<at::Tensor> write_indices = {};      // [N]  i32; default state_indices
  bool silu = true;
  std::string backend = "auto";
};
void causal_conv1d(const CausalConv1dParams& p);
void check_indices(const CausalConv1dParams& p);

/// The same for decode and verification. With num_accepted the history starts at row num_accepted[n] - 1; afterwards
/// the rows hold [history | inputs] without the oldest row, so that any acceptance count can be resumed. A sequence of
/// len tokens needs R >= W - 2 + len.
struct CausalConv1dUpdateParams {
  at::Tensor x;                                  // [T, D]     f32 | bf16 | f16, strided
  at::Tensor weight;                             // [D, W]     as x
  at::Tensor conv_state;                         // [S, R, D]  as x | f32, updated in place
  at::Tensor cu_seqlens;                         // [N+1]      i32
  at::Tensor state_indices;                      // [N]        i32, one slot per sequence
  at::Tensor out;                                // [T, D]     as x, strided, written
  HostFacts host = {};                           // R >= W - 2 + max_len
  std::optional<at::Tensor> bias = {};           // [D]  as x
  std::optional<at::Tensor> write_indices = {};  // [N]  i32; default state_indices
  std::optional<at::Tensor> num_accepted = {};   // [N]  i32, tokens accepted of the sequence's previous step
  bool silu = true;
  std::string backend = "auto";
};
void causal_conv1d_update(const CausalConv1dUpdateParams& p);
void check_indices(const CausalConv1dUpdateParams& p);

}  // namespace xgdn::kernel
