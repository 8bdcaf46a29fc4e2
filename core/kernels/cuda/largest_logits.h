// SPDX-License-Identifier: Apache-2.0
// The largest number of each row and its place on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace xgdn::kernel::cuda {

struct LargestLogitsArgs {
  int64_t R = 0;
  int64_t V = 0;                  // at least one
  const float* logits = nullptr;  // [R, V]
  int32_t* tokens = nullptr;      // [R]
  float* largest = nullptr;       // [R]
};

void largest_logits(const LargestLogitsArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
