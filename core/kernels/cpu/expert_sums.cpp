// SPDX-License-Identifier: Apache-2.0
// out[t] = sum over a of weights[t, a] * outputs[visits[t, a]].
//
// Loop: token -> choice -> lanes. Rounding: sums are f32, in the order of the choices; out is rounded once.
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

void expert_sums(const ExpertSumsArgs& args, int64_t begin_token, int64_t end_token) {
  const F32 d;
  const auto D = static_cast<size_t>(args.D);
  float* sums = scratch<ExpertSumsArgs>(2 * padded(args.D));
  float* outputs = sums + padded(args.D);
  for (int64_t token = begin_token; token < end_token; ++token) {
    std::fill_n(sums, padded(args.D), 0.0f);
    for (int64_t choice = 0; choice < args.A; ++choice) {
      const VF weight = hn::Set(d, load_scalar(args.weights.dtype, args.weights.at(token, choice)));
      load_row(args.outputs.dtype, args.outputs.at(args.visits[token * args.A + choice], 0), D, outputs);
      for (size_t i = 0; i < padded(args.D); i += hn::Lanes(d)) {
        hn::Store(hn::MulAdd(weight, hn::Load(d, outputs + i), hn::Load(d, sums + i)), d, sums + i);
      }
    }
    store_row(args.out.dtype, sums, D, args.out.at(token, 0));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(expert_sums);

void expert_sums(const ExpertSumsArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(expert_sums)(args, begin_token, end_token);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
