// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/chunk_gated_delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include "core/kernels/aten/indexing.h"
#include "core/kernels/npu/delta_rule.h"
#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {
namespace {

constexpr int64_t kChunkMaxHeads = 64;
constexpr int64_t kHeadDim = 128;

}  // namespace

Sentence why_not_chunk(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) {
  const Capabilities& c = capabilities();
  if (Sentence sentence = why_not_dtype(p.q, p.state, c.why_not_chunk_f32_state)) return sentence;
  if (!c.why_not_chunk.empty()) return c.why_not_chunk;
  if (s.H > kChunkMaxHeads || s.HV > kChunkMaxHeads) {
    return c10::str("the chunk op takes at most ", kChunkMaxHeads, " heads, got H=", s.H, " HV=", s.HV);
  }
  const bool is_usual = s.K == kHeadDim && s.V == kHeadDim;
  if (!is_usual && (s.K != s.V || s.K > kHeadDim || !c.why_not_chunk_head_dims.empty())) {
    return c10::str("the chunk op takes head dims K = V = ", kHeadDim,
                    c.why_not_chunk_head_dims.empty() ? " or below" : "", ", got K=", s.K, " V=", s.V);
  }
  return why_not_lengths(p.host.cu_seqlens);
}

void run_chunk(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) {
  if (s.N == 0) return;
  const std::vector<int64_t> lengths = lengths_of(*p.host.cu_seqlens);
  const at::Tensor read = p.state_indices.to(at::kLong);
  const at::Tensor write = p.write_indices ? p.write_indices->to(at::kLong) : read;
  at::Tensor states = p.state.index({read.clamp_min(0)});
  if (p.has_initial_state) {
    states = at::where(aten::along(*p.has_initial_state, states), states, at::zeros({}, states.options()));
  }
  const at::Tensor is_read = read.ge(0);
  const bool is_all_in_place = !p.host.may_have_padding && !p.write_indices;
  std::vector<int64_t> present;
  for (size_t n = 0; n < lengths.size(); ++n) {
    if (lengths[n] > 0) present.push_back(static_cast<int64_t>(n));
  }
  if (!present.empty()) {
    const bool is_all = present.size() == lengths.size();
    const at::Tensor counts = p.cu_seqlens.slice(0, 1) - p.cu_seqlens.slice(0, 0, -1);
    const at::Tensor index = is_all ? at::Tensor() : device_indices(present, p.q);
    const Tokens given = tokens_of(p);
    const at::Tensor valid = p.host.may_have_padding
                                 ? is_read.index_select(0, aten::token_places(p.cu_seqlens, s.T).sequence)
                                 : at::Tensor();
    const Tokens x = p.host.may_have_padding ? given.without_padding(valid) : given;
    const auto [out, final_states] = chunk({.q = x.q,
                                            .k = x.k,
                                            .v = x.v,
                                            .beta = x.beta,
                                            .initial_state = is_all ? states : states.index_select(0, index),
                                            .lengths = is_all ? counts : counts.index_select(0, index),
                                            .scale = scale_of(p.scale, s.K),
                                            .g = x.g});
    states = is_all ? final_states : states.index_copy(0, index, final_states);
    p.out.copy_(p.host.may_have_padding ? masked(out, valid) : out);
  }
  if (is_all_in_place) {
    p.state.index_copy_(0, write, states);
    return;
  }
  aten::write_slots(p.state, write, is_read.logical_and(write.ge(0)), states);
}

}  // namespace xgdn::kernel::npu
