// SPDX-License-Identifier: Apache-2.0
// A mixture of experts on CUDA over pointers, strides and sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// Letters as in core/kernels/ops.
struct MoeExpertsArgs {
  int64_t T = 0;
  int64_t A = 0;
  int64_t E = 0;
  int64_t D = 0;
  int64_t I = 0;
  InRows x;                         // [T, D]
  InRows weights;                   // [T, A]
  const int64_t* chosen = nullptr;  // [T, A]
  const void* gate_up = nullptr;    // [E, 2I, D]  as x
  const void* down = nullptr;       // [E, D, I]   as x
  OutRows out;                      // [T, D]
  void* workspace = nullptr;        // aligned to 16 bytes
};

/// Whether the kernels can read these tensors: rows that begin at multiples of 16 bytes, and no more experts than one
/// block can count.
bool moe_experts_supports(const MoeExpertsArgs& args);

/// What `workspace` has room for; depends on sizes alone.
size_t workspace_bytes(const MoeExpertsArgs& args);

void moe_experts(const MoeExpertsArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
