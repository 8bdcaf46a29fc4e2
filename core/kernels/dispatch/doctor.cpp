// SPDX-License-Identifier: Apache-2.0
// Which backend serves which op, asked with tensors of a typical shape.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "core/kernels/dispatch/op_checks.h"
#include "core/kernels/dispatch/selection.h"

namespace xgdn::kernel {
namespace {

template <typename Params>
void report(std::vector<BackendReport>& rows, const Params& sample) {
  const auto s = checked_shape(sample);
  const std::string chosen = default_backend(Op<Params>::phase);
  bool found = false;
  for (const Backend* b : backends()) {
    BackendReport row{std::string(Op<Params>::name), std::string(b->name()), why_not(*b, sample, s), false};
    row.is_selected = !found && !row.why_not && (chosen == "auto" || chosen == b->name());
    found = found || row.is_selected;
    row.is_batch_invariant = !row.why_not && b->is_batch_invariant(sample, s);
    rows.push_back(row);
  }
  for (const AbsentBackend& absent : absent_backends()) {
    rows.push_back({std::string(Op<Params>::name), absent.name, absent.why, false});
  }
}

}  // namespace

std::vector<BackendReport> doctor() {
  constexpr int64_t kHeads = 1;
  constexpr int64_t kDim = 128;
  const at::Tensor head = at::zeros({1, kHeads, kDim}, at::kBFloat16);
  const at::Tensor gate = at::zeros({1, kHeads}, at::kFloat);
  const at::Tensor logit = at::zeros({1, kHeads}, at::kBFloat16);
  const at::Tensor per_head = at::zeros({kHeads}, at::kFloat);
  const at::Tensor state = at::zeros({1, kHeads, kDim, kDim}, at::kFloat);
  const at::Tensor row = at::zeros({1, 3 * kDim}, at::kBFloat16);
  const at::Tensor taps = at::zeros({3 * kDim, 4}, at::kBFloat16);
  const at::Tensor conv_state = at::zeros({1, 3, 3 * kDim}, at::kBFloat16);
  const at::Tensor slot = at::zeros({1}, at::kInt);
  at::Tensor cu_seqlens = at::zeros({2}, at::kInt);
  cu_seqlens.data_ptr<int32_t>()[1] = 1;
  const ChunkMetadata chunk = build_chunk_metadata({1}, kHeads);
  const at::Tensor out = at::empty_like(head);
  const at::Tensor out_row = at::empty_like(row);
  const at::Tensor beta = at::empty_like(gate);

  std::vector<BackendReport> rows;
  report<RecurrentGatedDeltaRuleParams>(rows, {.q = head,
                                               .k = head,
                                               .v = head,
                                               .g = gate,
                                               .beta = gate,
                                               .state = state,
                                               .cu_seqlens = cu_seqlens,
                                               .state_indices = slot,
                                               .out = out});
  report<ChunkGatedDeltaRuleParams>(rows, {.q = head,
                                           .k = head,
                                           .v = head,
                                           .g = gate,
                                           .beta = gate,
                                           .state = state,
                                           .cu_seqlens = cu_seqlens,
                                           .state_indices = slot,
                                           .chunk_indices = chunk.chunk_indices_chunk64,
                                           .chunk_offsets = chunk.chunk_offsets_chunk64,
                                           .out = out});
  report<PackedDecodeParams>(rows, {.mixed_qkv = row,
                                    .a = logit,
                                    .b = logit,
                                    .A_log = per_head,
                                    .dt_bias = per_head,
                                    .state = state,
                                    .state_indices = slot,
                                    .out = out});
  report<CausalConv1dParams>(rows, {.x = row,
                                    .weight = taps,
                                    .conv_state = conv_state,
                                    .cu_seqlens = cu_seqlens,
                                    .state_indices = slot,
                                    .out = out_row});
  report<CausalConv1dUpdateParams>(rows, {.x = row,
                                          .weight = taps,
                                          .conv_state = conv_state,
                                          .cu_seqlens = cu_seqlens,
                                          .state_indices = slot,
                                          .out = out_row});
  report<GdnGatingParams>(rows,
                          {.a = logit, .b = logit, .A_log = per_head, .dt_bias = per_head, .g = gate, .beta = beta});
  report<L2NormParams>(rows, {.x = head, .out = out});
  report<RmsNormGatedParams>(rows, {.x = head, .z = head, .weight = at::zeros({kDim}, at::kFloat), .out = out});
  report<GdnDecodeStepParams>(rows, {.projected = at::zeros({1, 4 * kDim + 2}, at::kBFloat16),
                                     .conv_weight = taps,
                                     .conv_state = conv_state,
                                     .A_log = per_head,
                                     .dt_bias = per_head,
                                     .state = state,
                                     .norm_weight = at::zeros({kDim}, at::kFloat),
                                     .state_indices = slot,
                                     .out = out});

  const at::Tensor token = at::zeros({1, kDim}, at::kBFloat16);
  const at::Tensor out_token = at::empty_like(token);
  const at::Tensor square = at::zeros({kDim, kDim}, at::kBFloat16);
  report<RmsNormParams>(rows, {.x = head, .weight = at::zeros({kDim}, at::kFloat), .out = out});
  report<SiluAndMulParams>(rows, {.gate = token, .up = token, .out = out_token});
  report<LinearParams>(rows, {.x = token, .weight = square, .out = out_token});
  const at::Tensor block = at::zeros({1, 1, kHeads, kDim}, at::kBFloat16);
  report<PagedAttentionParams>(rows, {.q = head,
                                      .k = block,
                                      .v = block,
                                      .block_ids = slot,
                                      .sequences = {{.num_tokens = 1, .context_len = 1, .num_blocks = 1}},
                                      .out = out,
                                      .context_rows = slot});
  const ExpertWeights experts{.gate = {square}, .up = {square}, .down = {square}};
  report<MoeExpertsParams>(
      rows,
      {.x = token, .weights = logit, .chosen = at::zeros({1, 1}, at::kLong), .experts = experts, .out = out_token});
  return rows;
}

}  // namespace xgdn::kernel
