// SPDX-License-Identifier: Apache-2.0
// out[t] = sum over a of weights[t, a] * down(row of the visit t, a).
//
//            D ->
//        +--+--+--+   Loop: expert -> its visits -> lanes, for a block of outputs of all experts, whose sums are a
//   V    |  |##|  |   thread's own: what the experts give is never in memory but for the block.
//        +--+--+--+   Rounding: an expert's outputs and the sums are f32, of a token in ascending order of its experts
//                     (of one chosen twice: of the choices) whatever tokens are beside it; out is rounded once.
#include "core/kernels/cpu/expert_sums.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/expert_sums.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// The width of a block is a multiple of what a vector holds.
void add_weighted(float weight, const float* HWY_RESTRICT x, size_t width, float* HWY_RESTRICT sums) {
  const F32 d;
  const VF factor = hn::Set(d, weight);
  for (size_t i = 0; i < width; i += hn::Lanes(d)) {
    hn::Store(hn::MulAdd(factor, hn::Load(d, x + i), hn::Load(d, sums + i)), d, sums + i);
  }
}

void expert_sums(const ExpertSumsArgs& args, int64_t begin_item, int64_t end_item) {
  static_assert(kExpertBlock % kMaxLanes == 0);
  const int64_t output = begin_item * kExpertBlock;
  const int64_t columns = (end_item - begin_item) * kExpertBlock;
  const auto width = static_cast<size_t>(columns);
  int64_t most = 0;
  for (const ExpertVisits::Group& group : args.visits->groups) most = std::max(most, group.count);

  const auto tokens = static_cast<size_t>(args.T);
  float* sums = scratch<ExpertSumsArgs>((tokens + static_cast<size_t>(most)) * width);
  float* products = sums + tokens * width;
  std::fill_n(sums, tokens * width, 0.0f);
  for (const ExpertVisits::Group& group : args.visits->groups) {
    args.down->multiply(group, output, columns,
                        {.data = products, .dtype = DType::kFloat32, .token_stride = columns, .head_stride = 1});
    for (int64_t i = 0; i < group.count; ++i) {
      const auto visit = static_cast<size_t>(group.begin + i);
      const int64_t token = args.visits->tokens[visit];
      const float weight =
          load_scalar(args.weights.dtype, args.weights.at(token, args.visits->choices[visit] - token * args.A));
      add_weighted(weight, products + static_cast<size_t>(i) * width, width, sums + static_cast<size_t>(token) * width);
    }
  }
  for (int64_t token = 0; token < args.T; ++token) {
    store_row(args.out.dtype, sums + static_cast<size_t>(token) * width, width, args.out.at(token, output));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(expert_sums);

void expert_sums(const ExpertSumsArgs& args, int64_t begin_item, int64_t end_item) {
  HWY_DYNAMIC_DISPATCH(expert_sums)(args, begin_item, end_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
