// SPDX-License-Identifier: Apache-2.0
// Softmax attention over a paged cache, on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"
#include "core/kernels/cpu/kv_rows.h"
#include "core/kernels/cpu/packed_product.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct PagedAttentionArgs {
  int64_t HQ = 0;
  int64_t HKV = 0;
  int64_t D = 0;
  int64_t B = 0;            // rows of a block
  InRows q;                 // [T, HQ, D]
  KvRows cache_rows;        // int8, or of the dtype of q
  const void* k = nullptr;  // [P, B, HKV]
  const void* v = nullptr;  // [P, B, HKV]
  OutRows out;              // [T, HQ, D]
  float scale = 0;
  const BFloat16Products* products = nullptr;  // of bf16 queries; null: f32 vectors
};

/// Tokens of a sequence, one after the other, that read its context together.
struct AttentionBlock {
  int64_t token = 0;                // the first
  int64_t num_tokens = 0;           // any number
  int64_t context_len = 0;          // rows that the first token sees, its own among them; each sees one more than that
                                    // before it. Of less than 1 row the result is zero.
  const int32_t* blocks = nullptr;  // that hold the rows
};

/// Query heads of tokens that are best worked on together: they share what it costs to pack a row of the cache.
inline constexpr int64_t kAttentionRows = 256;

/// Attends with the query heads of key head `head`.
void paged_attention(const PagedAttentionArgs& args, const AttentionBlock& block, int64_t head);

}  // namespace xgdn::kernel::cpu
