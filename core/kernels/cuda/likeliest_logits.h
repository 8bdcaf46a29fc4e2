// SPDX-License-Identifier: Apache-2.0
// The largest numbers of each row on CUDA over pointers and sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace xgdn::kernel::cuda {

inline constexpr int64_t kMostFound = 256;  // of a row

struct LikeliestLogitsArgs {
  int64_t R = 0;
  int64_t V = 0;
  int64_t count = 0;              // 1 up to V and kMostFound
  const float* logits = nullptr;  // [R, V]
  int32_t* found = nullptr;       // [R, 2, count]  bits of the logits, and their tokens; the likeliest first
};

void likeliest_logits(const LikeliestLogitsArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
