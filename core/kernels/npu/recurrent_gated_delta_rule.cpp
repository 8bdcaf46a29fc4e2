// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/recurrent_gated_delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/aten/indexing.h"
#include "core/kernels/npu/delta_rule.h"
#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {
namespace {

constexpr int64_t kRecurrentMaxHeads = 256;
constexpr int64_t kRecurrentMaxHeadDim = 256;

int64_t longest(const std::vector<int64_t>& lengths) {
  return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
}

// One call of the recurrent op: B sequences, lengths [B] i32, one slot per token.
at::Tensor call_recurrent(const Tokens& x, const at::Tensor& pool, const at::Tensor& lengths,
                          const at::Tensor& token_slots, double scale) {
  const Capabilities& c = capabilities();
  const at::Tensor given =
      c.lengths == Lengths::kPerSequence ? lengths : at::cat({constant(0, 1, lengths.options()), lengths});
  return recurrent(c.recurrent_op, {.q = x.q,
                                    .k = x.k,
                                    .v = x.v,
                                    .state = pool,
                                    .beta = x.beta,
                                    .scale = scale,
                                    .lengths = given,
                                    .state_indices = token_slots,
                                    .num_accepted = constant(1, lengths.size(0), lengths.options()),
                                    .g = x.g});
}

// All tokens of all sequences in as many calls as the longest needs pieces of 8. A later piece of a verification starts
// from the state after the token before it, which lies in that token's slot.
at::Tensor advance(const Tokens& x, const at::Tensor& pool, const at::Tensor& token_slots, const at::Tensor& cu_seqlens,
                   const std::vector<int64_t>& lengths, bool is_verification, double scale) {
  const bool has_empty = std::find(lengths.begin(), lengths.end(), 0) != lengths.end();
  if (!has_empty && longest(lengths) <= kMaxTokens) {
    const bool is_one_each = static_cast<int64_t>(lengths.size()) == x.q.size(0);
    const at::Tensor counts = is_one_each ? constant(1, x.q.size(0), cu_seqlens.options())
                                          : cu_seqlens.slice(0, 1) - cu_seqlens.slice(0, 0, -1);
    return call_recurrent(x, pool, counts, token_slots, scale);
  }
  at::Tensor out = at::empty_like(x.v);
  for (int64_t begin = 0; begin < longest(lengths); begin += kMaxTokens) {
    std::vector<int64_t> rows, firsts, counts;
    int64_t start = 0;
    for (int64_t length : lengths) {
      const int64_t count = std::clamp<int64_t>(length - begin, 0, kMaxTokens);
      if (count > 0) {
        firsts.push_back(start + begin);
        counts.push_back(count);
      }
      for (int64_t t = 0; t < count; ++t) rows.push_back(start + begin + t);
      start += length;
    }
    const at::Tensor index = device_indices(rows, x.q);
    if (is_verification && begin > 0) {
      const at::Tensor first = device_indices(firsts, x.q);
      pool.index_put_({token_slots.index_select(0, first).to(at::kLong)},
                      pool.index({token_slots.index_select(0, first - 1).to(at::kLong)}));
    }
    out.index_copy_(0, index,
                    call_recurrent(x.rows(index), pool, device_indices(counts, x.q).to(at::kInt),
                                   token_slots.index_select(0, index), scale));
  }
  return out;
}

// The slot of each token, [T] i32.
at::Tensor token_slots(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  if (!p.num_accepted && s.T == s.N) return p.state_indices;
  const aten::TokenPlaces places = aten::token_places(p.cu_seqlens, s.T);
  return p.num_accepted ? p.state_indices.index({places.sequence, places.position})
                        : p.state_indices.index_select(0, places.sequence);
}

// No tokens: states may still move from read to write slots.
void copy_states(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  if (p.num_accepted || !p.write_indices || s.N == 0) return;
  const at::Tensor read = p.state_indices.to(at::kLong);
  const at::Tensor write = p.write_indices->to(at::kLong);
  aten::write_slots(p.state, write, read.ge(0).logical_and(write.ge(0)), p.state.index({read.clamp_min(0)}));
}

// States are copied to slots of their own, advanced there, and written where the call says.
void decode_staged(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s, const Tokens& x,
                   const std::vector<int64_t>& lengths, double scale) {
  const at::Tensor read = p.state_indices.to(at::kLong);
  const at::Tensor write = p.write_indices.value_or(p.state_indices).to(at::kLong);
  const at::Tensor sequence = aten::token_places(p.cu_seqlens, s.T).sequence;
  // The op takes no more tokens than slots; the rows past N are never named.
  const at::Tensor rows = at::arange(std::max(s.N, s.T), read.options()).clamp_max(s.N - 1);
  const at::Tensor staged = p.state.index({read.clamp_min(0).index_select(0, rows)});
  const at::Tensor valid = read.ge(0).index_select(0, sequence);
  const at::Tensor out =
      advance(x.without_padding(valid), staged, sequence.to(at::kInt), p.cu_seqlens, lengths, false, scale);
  aten::write_slots(p.state, write, read.ge(0).logical_and(write.ge(0)), staged.narrow(0, 0, s.N));
  p.out.copy_(masked(out, valid));
}

void verify(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s, const Tokens& x,
            const std::vector<int64_t>& lengths, double scale) {
  const at::Tensor column = p.num_accepted->to(at::kLong).unsqueeze(1) - 1;
  const at::Tensor table = p.state_indices.to(at::kLong);
  const at::Tensor read = table.gather(1, column).squeeze(1);
  const at::Tensor first = table.select(1, 0);
  const at::Tensor has_tokens = (p.cu_seqlens.slice(0, 1) - p.cu_seqlens.slice(0, 0, -1)).gt(0);
  const at::Tensor valid = read.ge(0).logical_and(has_tokens);
  if (!p.host.may_have_padding) {
    // Token 0 writes the table's first slot in any case, so the state to start from is put there.
    aten::write_slots(p.state, first, valid, p.state.index({read.clamp_min(0)}));
    p.out.copy_(advance(x, p.state, token_slots(p, s), p.cu_seqlens, lengths, /*is_verification=*/true, scale));
    return;
  }
  const aten::TokenPlaces places = aten::token_places(p.cu_seqlens, s.T);
  const at::Tensor staged_slots = places.sequence * s.L + places.position;  // slot n L + t of the staged pool
  const at::Tensor staged = p.state.index({read.clamp_min(0)}).repeat_interleave(s.L, 0);
  const at::Tensor is_read = read.ge(0).index_select(0, places.sequence);
  const at::Tensor out =
      advance(x.without_padding(is_read), staged, staged_slots.to(at::kInt), p.cu_seqlens, lengths, true, scale);
  const at::Tensor target = table.index({places.sequence, places.position});
  aten::write_slots(p.state, target, target.ge(0).logical_and(is_read), staged.index({staged_slots}));
  p.out.copy_(masked(out, is_read));
}

}  // namespace

bool is_in_place(const RecurrentGatedDeltaRuleParams& p) {
  return !p.num_accepted && !p.write_indices && !p.host.may_have_padding;
}

Sentence why_not_recurrent(const at::Tensor& in, const at::Tensor& state, const GdnShape& s) {
  const Capabilities& c = capabilities();
  if (c.recurrent_op == nullptr) return c.why_not_recurrent;
  if (Sentence sentence = why_not_dtype(in, state, c.why_not_f32_state)) return sentence;
  if (s.H > kRecurrentMaxHeads || s.HV > kRecurrentMaxHeads || s.K > kRecurrentMaxHeadDim ||
      s.V > kRecurrentMaxHeadDim) {
    return c10::str("the recurrent op takes at most ", kRecurrentMaxHeads, " heads of at most ", kRecurrentMaxHeadDim,
                    ", got H=", s.H, " HV=", s.HV, " K=", s.K, " V=", s.V);
  }
  if (s.T > s.S) return c10::str("the recurrent op takes at most as many tokens as slots, got T=", s.T, " S=", s.S);
  return std::nullopt;
}

Sentence why_not_recurrent(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  if (Sentence sentence = why_not_recurrent(p.q, p.state, s)) return sentence;
  return why_not_lengths(p.host.cu_seqlens);
}

void run_recurrent(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  const std::vector<int64_t> lengths = lengths_of(*p.host.cu_seqlens);
  const Tokens x = tokens_of(p);
  const double scale = scale_of(p.scale, s.K);
  if (s.T == 0) {
    copy_states(p, s);
    return;
  }
  if (p.num_accepted) {
    verify(p, s, x, lengths, scale);
  } else if (!is_in_place(p)) {
    decode_staged(p, s, x, lengths, scale);
  } else {
    p.out.copy_(advance(x, p.state, token_slots(p, s), p.cu_seqlens, lengths, /*is_verification=*/false, scale));
  }
}

}  // namespace xgdn::kernel::npu
