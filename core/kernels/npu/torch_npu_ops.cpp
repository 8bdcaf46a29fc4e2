// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/torch_npu_ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/StringUtil.h>

#include <map>

#include "core/errors.h"

namespace xgdn::kernel::npu {
namespace {

std::optional<c10::OperatorHandle> find(const char* name) {
  return c10::Dispatcher::singleton().findSchema({name, ""});
}

// Calls an op with arguments by name, in whatever order this version of its schema has them.
torch::jit::Stack call(const char* name, const std::map<std::string, c10::IValue>& arguments) {
  const std::optional<c10::OperatorHandle> op = find(name);
  if (!op) throw UnsupportedError(c10::str("[npu] expected the op ", name, ", got none: is torch_npu imported?"));
  torch::jit::Stack stack;
  size_t used = 0;
  for (const c10::Argument& argument : op->schema().arguments()) {
    const auto it = arguments.find(argument.name());
    if (it != arguments.end()) {
      stack.push_back(it->second);
      ++used;
    } else if (argument.default_value()) {
      stack.push_back(*argument.default_value());
    } else {
      throw UnsupportedError(c10::str("[npu] ", name, ": its schema needs an argument '", argument.name(),
                                      "' that xgdn does not know: ", toString(op->schema())));
    }
  }
  if (used != arguments.size()) {
    throw UnsupportedError(
        c10::str("[npu] ", name, ": its schema lacks an argument that xgdn gives: ", toString(op->schema())));
  }
  op->callBoxed(stack);
  return stack;
}

}  // namespace

bool is_registered(const char* name) {
  return find(name).has_value();
}

at::Tensor recurrent(const char* name, const RecurrentCall& c) {
  return call(name, {{"query", c.q},
                     {"key", c.k},
                     {"value", c.v},
                     {"state", c.state},
                     {"beta", c.beta},
                     {"scale", c.scale},
                     {"actual_seq_lengths", c.lengths},
                     {"ssm_state_indices", c.state_indices},
                     {"num_accepted_tokens", c.num_accepted},
                     {"g", c.g}})[0]
      .toTensor();
}

std::pair<at::Tensor, at::Tensor> chunk(const ChunkCall& c) {
  const torch::jit::Stack results = call(kChunkOp, {{"query", c.q},
                                                    {"key", c.k},
                                                    {"value", c.v},
                                                    {"beta", c.beta},
                                                    {"initial_state", c.initial_state},
                                                    {"actual_seq_lengths", c.lengths},
                                                    {"scale", c.scale},
                                                    {"g", c.g}});
  return {results[0].toTensor(), results[1].toTensor()};
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma, double eps) {
  return call(kRmsNormOp, {{"input", x}, {"gamma", gamma}, {"epsilon", eps}})[0].toTensor();
}

at::Tensor attention(const AttentionCall& c) {
  constexpr int64_t kCausalFromTheEnd = 3;
  return call(kAttentionOp, {{"query", c.q},
                             {"key", c.k},
                             {"value", c.v},
                             {"head_num", c.q.size(1)},
                             {"input_layout", "TND"},
                             {"atten_mask", c.mask},
                             {"scale", c.scale},
                             {"actual_seq_qlen", c.token_ends},
                             {"actual_seq_kvlen", c.context_ends},
                             {"sparse_mode", kCausalFromTheEnd}})[0]
      .toTensor();
}

Routed route(const at::Tensor& x, const at::Tensor& chosen, int64_t num_experts) {
  constexpr int64_t kCountPerExpert = 1;
  constexpr int64_t kNotQuantised = -1;
  constexpr int64_t kPlaceOfVisit = 0;
  const torch::jit::Stack results = call(kRoutingOp, {{"x", x},
                                                      {"expert_idx", chosen},
                                                      {"active_num", chosen.numel()},
                                                      {"expert_num", num_experts},
                                                      {"expert_tokens_num_type", kCountPerExpert},
                                                      {"expert_tokens_num_flag", true},
                                                      {"quant_mode", kNotQuantised},
                                                      {"active_expert_range", std::vector<int64_t>{0, num_experts}},
                                                      {"row_idx_type", kPlaceOfVisit}});
  return {results[0].toTensor(), results[1].toTensor(), results[2].toTensor()};
}

at::Tensor grouped_matmul(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& counts) {
  constexpr int64_t kOneResult = 2;
  constexpr int64_t kGroupsOfRows = 0;
  constexpr int64_t kCounts = 1;
  return call(kGroupedMatmulOp, {{"x", std::vector<at::Tensor>{rows}},
                                 {"weight", std::vector<at::Tensor>{weights}},
                                 {"group_list", counts},
                                 {"split_item", kOneResult},
                                 {"group_type", kGroupsOfRows},
                                 {"group_list_type", kCounts}})[0]
      .toTensorVector()
      .front();
}

at::Tensor swiglu(const at::Tensor& x) {
  return call(kSwigluOp, {{"input", x}})[0].toTensor();
}

at::Tensor finalize_routing(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& places) {
  constexpr int64_t kPlacesTokenByToken = 2;
  const c10::IValue none;
  return call(kFinalizeRoutingOp, {{"expanded_permuted_rows", rows},
                                   {"skip1", none},
                                   {"skip2", none},
                                   {"bias", none},
                                   {"scales", weights},
                                   {"expanded_src_to_dst_row", places},
                                   {"export_for_source_row", none},
                                   {"drop_pad_mode", kPlacesTokenByToken}})[0]
      .toTensor();
}

}  // namespace xgdn::kernel::npu
