// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/where.h>

#include <limits>

#include "core/kernels/aten/indexing.h"

namespace xgdn::kernel::aten {
namespace {

// A sequence of the call.
struct Sequence {
  int64_t index, token_begin, num_tokens, context_len;
};

// Rows [.., D + 4] of int8 as f32 [.., D].
at::Tensor widen_codes(const at::Tensor& rows) {
  const int64_t D = rows.size(-1) - kv_row_size(0, at::kChar);
  return rows.narrow(-1, 0, D).to(at::kFloat).mul_(rows.slice(-1, D).contiguous().view(at::kFloat));
}

// [t, HQ, D]. Of the blocks only the rows that hold the sequence's context are read: what other requests left in them
// cannot leak.
at::Tensor attend(const PagedAttentionParams& p, const Sequence& s) {
  const int64_t t = s.num_tokens;
  const int64_t context = s.context_len;
  const int64_t num_blocks = (context + p.k.size(1) - 1) / p.k.size(1);
  const bool is_int8 = p.k.scalar_type() == at::kChar;
  const at::Tensor tokens = p.q.narrow(0, s.token_begin, t);
  const at::Tensor q = is_int8 ? tokens.to(at::kFloat) : tokens;  // rounding widened codes to 16 bits would cost more
  const at::Tensor blocks = p.block_table.select(0, s.index).narrow(0, 0, num_blocks);
  const auto context_rows = [&](const at::Tensor& pool) {  // [1, HKV, context, D]
    const at::Tensor rows = pool.index_select(0, blocks).flatten(0, 1).narrow(0, 0, context);
    return (is_int8 ? widen_codes(rows) : rows).transpose(0, 1).unsqueeze(0);
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

void attend_one_by_one(const PagedAttentionParams& p) {
  const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* contexts = p.context_lens.const_data_ptr<int32_t>();
  for (int64_t n = 0; n < p.context_lens.numel(); ++n) {
    const Sequence s{n, cu[n], cu[n + 1] - cu[n], contexts[n]};
    if (s.num_tokens == 0) continue;
    const at::Tensor out = p.out.narrow(0, s.token_begin, s.num_tokens);
    s.context_len == 0 ? out.zero_() : out.copy_(attend(p, s));
  }
}

at::Tensor cache_rows(const at::Tensor& tokens, at::ScalarType cache_dtype) {
  if (cache_dtype != at::kChar) return tokens;
  constexpr double kSmallest = 0x1p-100;
  const at::Tensor x = tokens.to(at::kFloat);
  const at::Tensor largest = x.abs().amax(-1, /*keepdim=*/true);
  const at::Tensor most = at::full_like(largest, 127);  // 127 / largest as one rounding, not as a reciprocal
  const at::Tensor is_finite = largest.isfinite();
  const at::Tensor has_codes = is_finite.logical_and(largest.ge(kSmallest));
  const at::Tensor codes = at::where(has_codes, x * (most / largest), 0.0).round_().to(at::kChar);
  const at::Tensor scale = at::where(has_codes, largest / most, 0.0)
                               .masked_fill_(is_finite.logical_not(), std::numeric_limits<double>::quiet_NaN());
  return at::cat({codes, scale.view(at::kChar)}, -1);
}

void store_kv(const StoreKvParams& p) {
  if (p.k.size(0) == 0) return;
  const at::Tensor rows = p.slot_mapping.to(at::kLong);
  const auto store = [&](const at::Tensor& cache, const at::Tensor& tokens) {
    const at::Tensor cache_rows = cache.flatten(0, 1);
    if (p.host.may_have_padding) {
      write_slots(cache_rows, rows, rows.ge(0), tokens);
    } else {
      cache_rows.index_copy_(0, rows, tokens);
    }
  };
  store(p.k_cache, cache_rows(p.k, p.k_cache.scalar_type()));
  store(p.v_cache, cache_rows(p.v, p.v_cache.scalar_type()));
}

}  // namespace xgdn::kernel::aten
