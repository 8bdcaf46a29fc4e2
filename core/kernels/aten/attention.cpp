// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include "core/kernels/aten/indexing.h"

namespace xgdn::kernel::aten {
namespace {

// [t, HQ, D]. Of the blocks only the rows that hold the sequence's context are read: what other requests left in them
// cannot leak.
at::Tensor attend(const PagedAttentionParams& p, const AttentionSequence& sequence) {
  const int64_t t = sequence.num_tokens;
  const int64_t context = sequence.context_len;
  const at::Tensor q = p.q.narrow(0, sequence.token_begin, t);
  const at::Tensor blocks = p.block_ids.narrow(0, sequence.block_begin, sequence.num_blocks);
  const auto context_rows = [&](const at::Tensor& pool) {  // [1, HKV, context, D]
    return pool.index_select(0, blocks).flatten(0, 1).narrow(0, 0, context).transpose(0, 1).unsqueeze(0);
  };
  std::optional<at::Tensor> mask;
  if (t > 1 && t < context) {
    mask = at::ones({t, context}, q.options().dtype(at::kBool)).tril(context - t);
  }
  const bool is_causal = t > 1 && t == context;
  return at::scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), context_rows(p.k), context_rows(p.v), mask,
                                          /*dropout_p=*/0.0, is_causal, p.scale, /*enable_gqa=*/true)
      .squeeze(0)
      .transpose(0, 1);
}

}  // namespace

void attend_one_by_one(const PagedAttentionParams& p, int64_t more_than) {
  for (const AttentionSequence& sequence : p.sequences) {
    if (sequence.num_tokens <= more_than) continue;
    p.out.narrow(0, sequence.token_begin, sequence.num_tokens).copy_(attend(p, sequence));
  }
}

void store_kv(const StoreKvParams& p) {
  if (p.k.size(0) == 0) return;
  const at::Tensor rows = p.slot_mapping.to(at::kLong);
  const auto store = [&](const at::Tensor& cache, const at::Tensor& tokens) {
    const at::Tensor cache_rows = cache.flatten(0, 1);
    if (p.may_have_padding) {
      write_slots(cache_rows, rows, rows.ge(0), tokens);
    } else {
      cache_rows.index_copy_(0, rows, tokens);
    }
  };
  store(p.k_cache, p.k);
  store(p.v_cache, p.v);
}

}  // namespace xgdn::kernel::aten
