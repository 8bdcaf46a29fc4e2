// SPDX-License-Identifier: Apache-2.0
// out = weight * (x / rms(x)) * silu(z) over the last dimension.
//
// Loop: row -> lanes, once for the sum of squares and once for the result. Rounding: inputs are widened exactly, all is
// f32, out is rounded once. Order of the sum: lane i adds elements i, i + lanes, ... ascending, then the lanes.
#include "core/kernels/cpu/rms_norm_gated.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/rms_norm_gated.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

void rms_norm_gated(const RmsNormGatedArgs& args, int64_t begin_row, int64_t end_row) {
  const F32 d;
  const size_t width = padded(args.V);
  // Zeros past the last element of x add nothing to the sum; the result goes to z, so that they stay zeros.
  float* weight = scratch<RmsNormGatedArgs>(3 * width);
  std::fill_n(weight, 3 * width, 0.0f);
  float* x = weight + width;
  float* z = x + width;
  load_row(args.weight.dtype, args.weight.data, args.V, weight);

  for (int64_t i = begin_row; i < end_row; ++i) {
    const int64_t token = i / args.HV;
    const int64_t head = i % args.HV;
    load_row(args.x.dtype, args.x.at(token, head), args.V, x);
    load_row(args.z.dtype, args.z.at(token, head), args.V, z);
    VF squares = hn::Zero(d);
    for (size_t j = 0; j < width; j += hn::Lanes(d)) {
      const VF xj = hn::Load(d, x + j);
      squares = hn::MulAdd(xj, xj, squares);
    }
    const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(args.V);
    const VF inverse_rms = hn::Set(d, 1.0f / std::sqrt(mean + args.eps));
    for (size_t j = 0; j < width; j += hn::Lanes(d)) {
      const VF zj = hn::Load(d, z + j);
      const VF gate = hn::Mul(zj, sigmoid(d, zj));
      const VF normed = hn::Mul(hn::Mul(hn::Load(d, x + j), inverse_rms), hn::Load(d, weight + j));
      hn::Store(hn::Mul(normed, gate), d, z + j);
    }
    store_row(args.out.dtype, z, args.V, args.out.at(token, head));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(rms_norm_gated);

void rms_norm_gated(const RmsNormGatedArgs& args, int64_t begin_row, int64_t end_row) {
  HWY_DYNAMIC_DISPATCH(rms_norm_gated)(args, begin_row, end_row);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
