// SPDX-License-Identifier: Apache-2.0
// Tensors of a typical shape, of which doctor() makes a call of each op: one token, one sequence, one head of D = 128.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/kernels/ops_api.h"

namespace xgdn::kernel {

/// In bf16 unless it says otherwise.
struct TypicalTensors {
  TypicalTensors();

  at::Tensor head;                 // [1, 1, D]
  at::Tensor out;                  // [1, 1, D]
  at::Tensor gate;                 // [1, 1]  f32
  at::Tensor out_gate;             // [1, 1]  f32
  at::Tensor out_beta;             // [1, 1]  f32
  at::Tensor logit;                // [1, 1]
  at::Tensor per_head;             // [1]  f32
  at::Tensor per_dim;              // [D]  f32
  at::Tensor state;                // [1, 1, D, D]  f32
  ReplayRing ring;                 // of 32 rows
  at::Tensor row;                  // [1, 3D]  q, k and v
  at::Tensor out_row;              // [1, 3D]
  at::Tensor taps;                 // [3D, 4]
  at::Tensor conv_state;           // [1, 3, 3D]
  at::Tensor projected;            // [1, 4D + 2]
  at::Tensor token;                // [1, D]
  at::Tensor out_token;            // [1, D]
  at::Tensor square;               // [D, D]
  at::Tensor gate_up;              // [1, 2D, D]  of an expert
  at::Tensor down;                 // [1, D, D]  of it
  QuantizedWeight packed;          // square in 8 bits
  QuantizedWeight packed_gate_up;  // gate_up
  QuantizedWeight packed_down;     // down
  at::Tensor block;                // [1, 1, 1, D]  of a cache
  at::Tensor out_block;            // [1, 1, 1, D]
  at::Tensor chosen;               // [1, 1]  i64
  at::Tensor slot;                 // [1]  i32, 0
  at::Tensor cu_seqlens;           // [2]  i32, 0 and 1
  ChunkMetadata chunk;             // of cu_seqlens
};

}  // namespace xgdn::kernel
