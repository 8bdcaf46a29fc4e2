// SPDX-License-Identifier: Apache-2.0
// Maps of strided rows by which a kernel of Hopper copies boxes of them.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/cuda/alignment.h"

namespace xgdn::kernel::cuda {

/// A map of bf16 rows [tokens, heads, dim] in boxes of `box_tokens` tokens and 64 elements of a head, which lie in
/// shared memory as panels of 128-byte rows whose pieces of 16 bytes are swizzled. False where the rows cannot be
/// mapped.
template <class Rows>
bool make_tensor_map(CUtensorMap& map, const Rows& rows, int64_t tokens, int64_t heads, int64_t dim, int box_tokens) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  if (encode == nullptr || rows.dtype != DType::kBFloat16 || !is_aligned(rows)) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(rows.head_stride) * 2,
                                static_cast<cuuint64_t>(rows.token_stride) * 2};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t steps[] = {1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(static_cast<const void*>(rows.data)),
                sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace xgdn::kernel::cuda
