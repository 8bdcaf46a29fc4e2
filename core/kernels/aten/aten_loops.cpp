// SPDX-License-Identifier: Apache-2.0
// The ops whose ATen form goes one by one: attention through the sequences, the mixture through the experts that were
// chosen, which are read on the host. Right where a launch and a host read cost nothing; other devices override them.
#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>
#include <c10/util/StringUtil.h>

#include "core/kernels/backend.h"

namespace xgdn::kernel {
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

at::Tensor expert(const ExpertWeights& experts, size_t e, const at::Tensor& x) {
  return at::linear(at::silu(at::linear(x, experts.gate[e])) * at::linear(x, experts.up[e]), experts.down[e]);
}

}  // namespace

void Backend::run(const PagedAttentionParams& p, const AttentionShape&) const {
  attend_one_by_one(p, /*more_than=*/0);
}

void Backend::attend_one_by_one(const PagedAttentionParams& p, int64_t more_than) {
  for (const AttentionSequence& sequence : p.sequences) {
    if (sequence.num_tokens <= more_than) continue;
    p.out.narrow(0, sequence.token_begin, sequence.num_tokens).copy_(attend(p, sequence));
  }
}

void Backend::run(const MoeExpertsParams& p, const ExpertsShape& s) const {
  const at::Tensor chosen = p.chosen.to(at::kCPU);
  std::vector<std::vector<int64_t>> visits(static_cast<size_t>(s.E));  // flat indices into chosen
  for (int64_t i = 0; i < chosen.numel(); ++i) visits[chosen.const_data_ptr<int64_t>()[i]].push_back(i);

  p.out.zero_();
  for (size_t e = 0; e < visits.size(); ++e) {
    if (visits[e].empty()) continue;
    const at::Tensor visit = at::tensor(visits[e], p.x.options().dtype(at::kLong));
    const at::Tensor token = visit.floor_divide(s.A);
    const at::Tensor weight = p.weights.flatten().index_select(0, visit).unsqueeze(1);
    p.out.index_add_(0, token, expert(p.experts, e, p.x.index_select(0, token)) * weight);
  }
}

}  // namespace xgdn::kernel
