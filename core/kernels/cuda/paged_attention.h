// SPDX-License-Identifier: Apache-2.0
// Softmax attention over a paged cache on CUDA over pointers, strides and sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// Letters as in core/kernels/ops. D is a multiple of 8 and at most 256; the caches are aligned to 16 bytes.
struct PagedAttentionArgs {
  int64_t T = 0;
  int64_t N = 0;
  int64_t M = 0;
  int64_t HQ = 0;
  int64_t HKV = 0;
  int64_t D = 0;
  int64_t B = 0;                          // rows of a block
  int64_t max_len = 1;                    // no sequence has more tokens
  InRows q;                               // [T, HQ, D]
  bool are_int8 = false;                  // rows of k and v; else of the dtype of q
  const void* k = nullptr;                // [P, B, HKV, R]
  const void* v = nullptr;                // [P, B, HKV, R]
  const int32_t* block_table = nullptr;   // [N, M]
  int64_t block_table_stride = 0;         // from sequence to sequence
  const int32_t* context_lens = nullptr;  // [N]
  const int32_t* cu_seqlens = nullptr;    // [N+1]
  OutRows out;                            // [T, HQ, D]
  float scale = 0;
  void* workspace = nullptr;  // aligned to 16 bytes
};

/// What `workspace` has room for; depends on sizes alone.
size_t workspace_bytes(const PagedAttentionArgs& args);

void paged_attention(const PagedAttentionArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
