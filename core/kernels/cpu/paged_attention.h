// SPDX-License-Identifier: Apache-2.0
// Softmax attention of single tokens over a paged cache, on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops. The blocks have the dtype of q.
struct PagedAttentionArgs {
  int64_t HQ = 0;
  int64_t HKV = 0;
  int64_t D = 0;
  int64_t B = 0;            // rows of a block
  InRows q;                 // [T, HQ, D]
  const void* k = nullptr;  // [P, B, HKV, D]
  const void* v = nullptr;  // [P, B, HKV, D]
  OutRows out;              // [T, HQ, D]
  float scale = 0;
};

/// A token and what it sees.
struct AttentionToken {
  int64_t token = 0;
  int64_t context_len = 0;          // rows, its own among them; 0: its result is zero
  const int32_t* blocks = nullptr;  // that hold the rows
};

/// Attends with the query heads of key head `head`.
void paged_attention(const PagedAttentionArgs& args, const AttentionToken& token, int64_t head);

}  // namespace xgdn::kernel::cpu
