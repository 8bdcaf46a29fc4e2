// SPDX-License-Identifier: Apache-2.0
// Attention over a paged cache, and what writes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// One sequence of an attention call, known on the host. Its blocks are block_ids[block_begin, block_begin +
/// num_blocks).
struct AttentionSequence {
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
  int64_t context_len = 0;  // tokens in the cache, these included
  int64_t block_begin = 0;
  int64_t num_blocks = 0;
};

/// Softmax attention over a paged cache: HQ query heads read HKV key heads (head h reads h / (HQ/HKV)), P blocks of B
/// rows. The last token of a sequence sees its whole context, the one before it all but one row. Rows outside the
/// sequences' contexts are never read, whatever they hold. The sequences cover the tokens 0..T-1 in order.
struct PagedAttentionParams {
  at::Tensor q;                                 // [T, HQ, D]      f32 | bf16 | f16, strided
  at::Tensor k;                                 // [P, B, HKV, D]  as q
  at::Tensor v;                                 // [P, B, HKV, D]  as q
  at::Tensor block_ids;                         // [M]             i32, the sequences' blocks, one after another
  std::vector<AttentionSequence> sequences;     // on the host
  at::Tensor out;                               // [T, HQ, D]      as q, strided, written
  std::optional<at::Tensor> context_rows = {};  // [C]  i32, block * B + offset of every row of the contexts, for
                                                // backends that read all sequences at once
  std::optional<double> scale = {};             // default D^-0.5
  std::string backend = "auto";
};
void paged_attention(const PagedAttentionParams& p);
void check_indices(const PagedAttentionParams& p);

/// Writes keys and values of new tokens to their rows of a paged cache of P blocks of B rows. No row is named twice.
/// Rows that are not named are bitwise unchanged.
struct StoreKvParams {
  at::Tensor k;                  // [T, HKV, D]     f32 | bf16 | f16, strided
  at::Tensor v;                  // [T, HKV, D]     as k, strided
  at::Tensor k_cache;            // [P, B, HKV, D]  as k, updated in place
  at::Tensor v_cache;            // [P, B, HKV, D]  as k, updated in place
  at::Tensor slot_mapping;       // [T]             i32, block * B + offset of each token's row; kPadSlot: not stored
  bool may_have_padding = true;  // false: the caller promises that no row is kPadSlot
  std::string backend = "auto";
};
void store_kv(const StoreKvParams& p);
void check_indices(const StoreKvParams& p);

}  // namespace xgdn::kernel
