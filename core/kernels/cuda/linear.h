// SPDX-License-Identifier: Apache-2.0
// Products of few tokens with a weight on CUDA, with the norm before and the gate behind them: a stream over the
// weight.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// Letters as in core/kernels/ops. All but bias and out are bf16.
struct LinearArgs {
  int64_t T = 0;
  int64_t D = 0;
  int64_t O = 0;
  InRows x;                      // [T, D]
  const void* weight = nullptr;  // [O, D]
  int64_t weight_stride = 0;     // from row to row
  InRows bias;                   // [O]  no data: none
  OutRows out;                   // [T, O]; [T, O/2] with silu_and_mul
  bool has_constant_weight = false;

  InRows norm_weight;    // [D]     no data: x is not normed
  InRows residual;       // [T, D]  beside norm_weight; no data: none
  OutRows residual_out;  // [T, D]  beside residual
  float eps = 0;         // beside norm_weight
  bool silu_and_mul = false;
};

/// Whether the call is one that the kernel is for: few tokens, bf16, rows aligned to 16 bytes, D a multiple of 32; with
/// a norm of 256, and fewer tokens still, for each block norms all of them.
bool linear_supports(const LinearArgs& args);

void linear(const LinearArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
