// SPDX-License-Identifier: Apache-2.0
// The rows of a paged cache on CUDA over pointers, strides and sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// Letters as in core/kernels/ops. The caches are seen as their rows, of all blocks one after another.
struct StoreKvArgs {
  int64_t T = 0;
  int64_t HKV = 0;
  int64_t D = 0;
  InRows k;                       // [T, HKV, D]
  InRows v;                       // [T, HKV, D]
  bool are_int8 = false;          // the rows of the caches; else of the dtype of k
  void* k_cache = nullptr;        // [rows, HKV, R]
  void* v_cache = nullptr;        // [rows, HKV, R]
  const int32_t* rows = nullptr;  // [T]  negative: the token is not stored
};

void store_kv(const StoreKvArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
