// SPDX-License-Identifier: Apache-2.0
// Attention over a paged cache, and what writes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

// A row of a cache, the D numbers of a key head, has the dtype of the tokens, R = D, or is int8, R = D + 4: D codes and
// the f32 scale that they share, x = scale * code, with D % 4 == 0. The scale is max |x| / 127, codes are rounded to
// nearest even; where max |x| is below 2^-100 all are zero. A row with an infinity or a NaN is NaN.

/// Elements of a row: R.
inline constexpr int64_t kv_row_size(int64_t D, at::ScalarType cache_dtype) {
  return cache_dtype == at::kChar ? D + static_cast<int64_t>(sizeof(float)) : D;
}

/// Softmax attention over a paged cache: HQ query heads read HKV key heads (head h reads h / (HQ/HKV)), P blocks of B
/// rows. A sequence's context is the rows of its blocks up to its length, its own tokens last: the last token sees all
/// of it, the one before it all but one row. What lies outside the contexts is never read, neither rows of the cache
/// nor entries of the table. A context of length 0 pads: its tokens' rows of `out` are zero.
struct PagedAttentionParams {
  at::Tensor q;                                 // [T, HQ, D]      f32 | bf16 | f16, strided
  at::Tensor k;                                 // [P, B, HKV, R]  as q | i8
  at::Tensor v;                                 // [P, B, HKV, R]  as k
  at::Tensor block_table;                       // [N, M]          i32, strided: the blocks of each sequence
  at::Tensor context_lens;                      // [N]             i32, rows of the cache that the sequence has
  at::Tensor cu_seqlens;                        // [N+1]           i32
  at::Tensor out;                               // [T, HQ, D]      as q, strided, written
  std::optional<at::Tensor> context_rows = {};  // [C]  i32, block * B + offset of every row of the contexts, one
                                                // sequence after another; see reads_context_rows
  HostFacts host = {};                          // cu_seqlens and context_lens, for backends whose kernels want them
  std::optional<double> scale = {};             // default D^-0.5
  std::string backend = "auto";
};
void paged_attention(const PagedAttentionParams& p);
void check_indices(const PagedAttentionParams& p);
/// Checks the lengths in `host`, for calls whose tensors are on a device. Throws RangeError or ShapeError.
void check_host_facts(const PagedAttentionParams& p);

/// Whether a backend of that device gathers all contexts at once, and so needs context_rows.
bool reads_context_rows(c10::Device device);

/// Whether the memory of a call on that device grows with its contexts; `backend` as in the call.
bool copies_contexts(c10::Device device, const std::string& backend);

/// Writes keys and values of new tokens to their rows of a paged cache of P blocks of B rows. No row is named twice.
/// Rows that are not named are bitwise unchanged.
struct StoreKvParams {
  at::Tensor k;             // [T, HKV, D]     f32 | bf16 | f16, strided
  at::Tensor v;             // [T, HKV, D]     as k, strided
  at::Tensor k_cache;       // [P, B, HKV, R]  as k | i8, updated in place
  at::Tensor v_cache;       // [P, B, HKV, R]  as k_cache, updated in place
  at::Tensor slot_mapping;  // [T]             i32, block * B + offset of each token's row; kPadSlot: not stored
  HostFacts host = {};
  std::string backend = "auto";
};
void store_kv(const StoreKvParams& p);
void check_indices(const StoreKvParams& p);

}  // namespace xgdn::kernel
