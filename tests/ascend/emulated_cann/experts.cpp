// SPDX-License-Identifier: Apache-2.0
// The ops of a mixture of experts, as the vendor documents them:
//
//   MoeInitRoutingV3      sorts the visits (token, choice) by expert; rows of tokens in that order, how many each
//                         expert has, and where each visit went
//   GroupedMatmulV4       rows of group e times weight[e]
//   SwiGlu                silu(left half) * right half
//   MoeFinalizeRoutingV2  out[t] = sum over the token's choices of scale * row
//
// Only the modes that xgdn calls are emulated; the others are refused.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "checks.h"
#include "op.h"

namespace emulated_cann {
namespace {

constexpr int64_t kMaxExperts = 10240;    // of the routing
constexpr int64_t kMaxGroups = 1024;      // of the grouped product
constexpr int64_t kMaxInnerSize = 65536;  // the last dimension of a factor is below

void check_routing(const Tensor& x, const Tensor& experts, const OptionalTensor& scale, const OptionalTensor& offset,
                   int64_t active_num, int64_t, int64_t num_experts, int64_t drop_pad_mode, int64_t count_type,
                   bool has_counts, int64_t quant_mode, const IntArray& range, int64_t row_type, const Tensor& rows,
                   const Tensor& places, const Tensor& counts, const Tensor&) {
  require(!scale && !offset && drop_pad_mode == 0 && count_type == 1 && has_counts && quant_mode == -1 && row_type == 0,
          kInvalidParameter, "only dropless routing to gather rows, with counts and without quantisation, is emulated");
  require(x.dim() == 2 && experts.dim() == 2 && x.size(0) == experts.size(0), kInvalidParameter,
          "x and expertIdx: expected [T, H] and [T, K], got ", x.sizes(), " and ", experts.sizes());
  const int64_t visits = experts.numel();
  require(visits > 0, kInvalidParameter, "expertIdx not support empty tensor, got ", experts.sizes());
  check_type("x", x, {at::kHalf, at::kBFloat16, at::kFloat, at::kChar});
  check_type("expertIdx", experts, {at::kInt});
  require(num_experts > 0 && num_experts <= kMaxExperts, kInvalidParameter, "expertNum: expected 1..", kMaxExperts,
          ", got ", num_experts);
  require(range == IntArray({0, num_experts}), kInvalidParameter, "activeExpertRange: only all experts are emulated");
  require(active_num == visits, kInvalidParameter, "activeNum: expected T K=", visits, ", got ", active_num);
  check_shape("expandedX", rows, {visits, x.size(1)});
  check_type("expandedX", rows, {x.scalar_type()});
  check_shape("expandedRowIdx", places, {visits});
  check_type("expandedRowIdx", places, {at::kInt});
  check_shape("expertTokensCount", counts, {num_experts});
  check_type("expertTokensCount", counts, {at::kLong});
}

void run_routing(Tensor x, Tensor experts, OptionalTensor, OptionalTensor, int64_t, int64_t, int64_t num_experts,
                 int64_t, int64_t, bool, int64_t, IntArray, int64_t, Tensor rows, Tensor places, Tensor counts,
                 Tensor) {
  const Tensor flat = experts.flatten().to(at::kLong);
  require_value(flat.min().item<int64_t>() >= 0 && flat.max().item<int64_t>() < num_experts,
                c10::str("expertIdx: expected 0..", num_experts - 1));
  const auto [sorted, visit] = at::sort(flat, /*stable=*/true, 0, /*descending=*/false);
  Tensor place = at::empty_like(visit);
  place.index_put_({visit}, at::arange(visit.numel()));
  write(rows, at::index_select(x, 0, visit.floor_divide(experts.size(1))));
  write(places, place);
  write(counts, at::bincount(flat, {}, num_experts));
}

using OptionalList = std::optional<TensorList>;

bool is_absent(const OptionalList& list) {
  return !list || list->empty();
}

void check_grouped(const TensorList& x, const TensorList& weight, const OptionalList& bias, const OptionalList& scale,
                   const OptionalList& offset, const OptionalList& antiquant_scale,
                   const OptionalList& antiquant_offset, const OptionalList& token_scale, const OptionalTensor& groups,
                   const OptionalList& activation, const OptionalList& activation_scale,
                   const OptionalList& activation_offset, int64_t split_item, int64_t group_type, int64_t list_type,
                   int64_t activation_type, const TensorList& out, const OptionalList&, const OptionalList&) {
  for (const OptionalList* list : {&bias, &scale, &offset, &antiquant_scale, &antiquant_offset, &token_scale,
                                   &activation, &activation_scale, &activation_offset}) {
    require(is_absent(*list), kInvalidParameter, "bias, quantisation and activation are not emulated");
  }
  require((split_item == 2 || split_item == 3) && group_type == 0 && list_type == 1 && activation_type == 0 && groups,
          kInvalidParameter, "only one product with counts of rows in groups is emulated");
  require(x.size() == 1 && weight.size() == 1 && out.size() == 1, kInvalidParameter,
          "x, weight and y: expected one tensor each, got ", x.size(), ", ", weight.size(), " and ", out.size());
  const Tensor& rows = x[0];
  const Tensor& matrices = weight[0];
  require(rows.dim() == 2 && matrices.dim() == 3, kInvalidParameter, "x and weight: expected 2 and 3 dimensions, got ",
          rows.sizes(), " and ", matrices.sizes());
  check_type("x", rows, {at::kHalf, at::kBFloat16, at::kFloat});
  check_type("weight", matrices, {rows.scalar_type()});
  check_type("groupList", groups, {at::kLong});
  check_type("y", out[0], {rows.scalar_type()});
  const int64_t num_groups = matrices.size(0);
  check_shape("weight", matrices, {num_groups, rows.size(1), matrices.size(2)});
  check_shape("groupList", groups, {num_groups});
  check_shape("y", out[0], {rows.size(0), matrices.size(2)});
  require(rows.is_contiguous(), kInvalidParameter, "x: expected a contiguous tensor, got strides ", rows.strides());
  const bool is_transposed = matrices.transpose(1, 2).is_contiguous();
  require(matrices.is_contiguous() || is_transposed, kInvalidParameter,
          "weight: expected a contiguous or transposed tensor, got strides ", matrices.strides());
  if (!strict()) return;
  require(num_groups >= 2 && num_groups <= kMaxGroups, kInvalidParameter, "groupList: expected 2..", kMaxGroups,
          " groups, got ", num_groups);
  const int64_t inner = std::max(rows.size(1), matrices.size(is_transposed ? 1 : 2));
  require(inner < kMaxInnerSize, kInvalidParameter, "x and weight: expected last dimensions below ", kMaxInnerSize,
          ", got ", inner);
}

void run_grouped(TensorList x, TensorList weight, OptionalList, OptionalList, OptionalList, OptionalList, OptionalList,
                 OptionalList, OptionalTensor groups, OptionalList, OptionalList, OptionalList, int64_t, int64_t,
                 int64_t, int64_t, TensorList out, OptionalList, OptionalList) {
  const Tensor counts = groups->contiguous();
  int64_t begin = 0;
  for (int64_t e = 0; e < counts.numel(); ++e) {
    const int64_t count = counts.const_data_ptr<int64_t>()[e];
    require_value(count >= 0 && begin + count <= x[0].size(0),
                  c10::str("groupList[", e, "]: expected 0..", x[0].size(0) - begin, ", got ", count));
    out[0]
        .narrow(0, begin, count)
        .copy_(at::matmul(x[0].narrow(0, begin, count).to(at::kFloat), weight[0][e].to(at::kFloat)));
    begin += count;
  }
  require_value(begin == x[0].size(0), c10::str("groupList: expected a sum of ", x[0].size(0), ", got ", begin));
}

void run_swiglu(Tensor x, int64_t dim, Tensor out) {
  const std::vector<Tensor> halves = x.to(at::kFloat).chunk(2, dim);
  write(out, at::silu(halves[0]) * halves[1]);
}

void check_finalize(const Tensor& rows, const Tensor& places, const OptionalTensor& skip1, const OptionalTensor& skip2,
                    const OptionalTensor& bias, const OptionalTensor& scales, const OptionalTensor& experts,
                    int64_t drop_pad_mode, const Tensor& out) {
  require(!skip1 && !skip2 && !bias && !experts && scales && drop_pad_mode == 2, kInvalidParameter,
          "only a weighted sum of visits that stand token by token (dropPadMode 2) is emulated");
  require(rows.dim() == 2 && scales->dim() == 2, kInvalidParameter, "expandedX and scales: expected 2 dimensions, got ",
          rows.sizes(), " and ", scales->sizes());
  check_type("expandedX", rows, {at::kHalf, at::kBFloat16, at::kFloat});
  check_type("scales", scales, {rows.scalar_type()});
  check_type("out", out, {rows.scalar_type()});
  check_type("expandedRowIdx", places, {at::kInt});
  check_shape("expandedX", rows, {scales->numel(), rows.size(1)});
  check_shape("expandedRowIdx", places, {scales->numel()});
  check_shape("out", out, {scales->size(0), rows.size(1)});
}

void run_finalize(Tensor rows, Tensor places, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor scales,
                  OptionalTensor, int64_t, Tensor out) {
  const Tensor place = places.to(at::kLong);
  require_value(place.min().item<int64_t>() >= 0 && place.max().item<int64_t>() < rows.size(0),
                c10::str("expandedRowIdx: expected 0..", rows.size(0) - 1));
  const Tensor visits = at::index_select(rows.to(at::kFloat), 0, place).unflatten(0, scales->sizes());
  write(out, (visits * scales->to(at::kFloat).unsqueeze(-1)).sum(1));
}

}  // namespace
}  // namespace emulated_cann

ACLNN_CHECKED(MoeInitRoutingV3, check_routing, run_routing)
ACLNN_CHECKED(GroupedMatmulV4, check_grouped, run_grouped)
ACLNN(SwiGlu, run_swiglu)
ACLNN_CHECKED(MoeFinalizeRoutingV2, check_finalize, run_finalize)
