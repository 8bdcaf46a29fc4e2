// SPDX-License-Identifier: Apache-2.0
#include "prefill.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

namespace xllm::kernel::gdn {

namespace ops = ::xgdn::kernel;

at::Tensor prefill(const PrefillInputs& in, const at::Tensor& states, const Sequences& sequences) {
  const at::Device device = in.q.device();
  const ops::ChunkTables tables = ops::build_chunk_tables(sequences.lengths());
  const at::Tensor out = at::empty(in.v.sizes(), in.v.options());
  ops::HostFacts host = sequences.host();
  host.may_have_padding = false;  // sequence n has slot n
  ops::chunk_gated_delta_rule({.q = in.q,
                               .k = in.k,
                               .v = in.v,
                               .g = in.g.to(at::kFloat),
                               .beta = in.beta.scalar_type() == in.q.scalar_type() ? in.beta : in.beta.to(at::kFloat),
                               .state = states,
                               .cu_seqlens = sequences.cu_seqlens,
                               .state_indices = at::arange(sequences.num(), sequences.cu_seqlens.options()),
                               .chunk_indices = at::tensor(tables.indices, at::kInt).view({-1, 2}).to(device),
                               .chunk_offsets = at::tensor(tables.offsets, at::kInt).to(device),
                               .out = out,
                               .host = host,
                               .scale = in.scale,
                               .use_qk_l2norm_in_kernel = in.use_qk_l2norm,
                               .backend = in.backend});
  return out;
}

}  // namespace xllm::kernel::gdn
