// SPDX-License-Identifier: Apache-2.0
// Which backend serves which op, asked with a call of a typical shape.
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include "core/kernels/dispatch/op_checks.h"
#include "core/kernels/dispatch/selection.h"

namespace xgdn::kernel {
namespace {

at::Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype = at::kBFloat16) {
  return at::zeros(sizes, dtype);
}

template <typename Params>
void report(std::vector<BackendReport>& rows, const Params& call) {
  const auto s = checked_shape(call);
  const std::string chosen = default_backend(Op<Params>::phase);
  bool found = false;
  for (const Backend* b : backends()) {
    BackendReport row{std::string(Op<Params>::name), std::string(b->name()), why_not(*b, call, s), false};
    row.is_selected = !found && !row.why_not && (chosen == "auto" || chosen == b->name());
    found = found || row.is_selected;
    row.is_batch_invariant = !row.why_not && b->is_batch_invariant(call, s);
    rows.push_back(row);
  }
  for (const AbsentBackend& absent : absent_backends()) {
    rows.push_back({std::string(Op<Params>::name), absent.name, absent.why, false});
  }
}

}  // namespace

TypicalTensors::TypicalTensors() {
  constexpr int64_t D = 128;
  head = zeros({1, 1, D}), out = zeros({1, 1, D});
  gate = zeros({1, 1}, at::kFloat), out_gate = zeros({1, 1}, at::kFloat), out_beta = zeros({1, 1}, at::kFloat);
  logit = zeros({1, 1});
  per_head = zeros({1}, at::kFloat), per_dim = zeros({D}, at::kFloat);
  state = zeros({1, 1, D, D}, at::kFloat);
  ring = {.k = zeros({1, 1, 32, D}, at::kFloat),
          .u = zeros({1, 1, 32, D}, at::kFloat),
          .g = zeros({1, 1, 32}, at::kFloat),
          .length = zeros({1}, at::kInt)};
  row = zeros({1, 3 * D}), out_row = zeros({1, 3 * D});
  taps = zeros({3 * D, 4}), conv_state = zeros({1, 3, 3 * D});
  projected = zeros({1, 4 * D + 2});
  token = zeros({1, D}), out_token = zeros({1, D});
  square = zeros({D, D}), block = zeros({1, 1, 1, D}), out_block = zeros({1, 1, 1, D});
  chosen = zeros({1, 1}, at::kLong), slot = zeros({1}, at::kInt);
  cu_seqlens = at::arange(2, at::kInt);
  gate_up = zeros({1, 2 * D, D}), down = zeros({1, D, D});
  packed = {.codes = zeros({D / 16, D / 4, 16, 4}, at::kChar), .scales = zeros({D / 16, 1, 16})};
  packed_gate_up = {.codes = zeros({1, D / 8, D / 4, 16, 4}, at::kChar), .scales = zeros({1, D / 8, 1, 16})};
  packed_down = {.codes = packed.codes.unsqueeze(0), .scales = packed.scales.unsqueeze(0)};
  chunk = build_chunk_metadata({1});
}

std::vector<BackendReport> doctor() {
  const TypicalTensors tensors;
  std::vector<BackendReport> rows;
  for_each_op([&]<class Params>(std::type_identity<Params>) { report(rows, sample<Params>(tensors)); });
  return rows;
}

}  // namespace xgdn::kernel
