// SPDX-License-Identifier: Apache-2.0
// out = weight * (x / rms(x)) * silu(z) over the last dimension.
//
// Loop: row -> lanes, once for the sum of squares and once for the result. Rounding: inputs are widened exactly, out is
// rounded once; the rest: rms_norm_gated-inl.h.
#include "core/kernels/cpu/rms_norm_gated.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/rms_norm_gated.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/rms_norm_gated-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

void rms_norm_gated(const RmsNormGatedArgs& args, int64_t begin_row, int64_t end_row) {
  const size_t width = padded(args.V);
  float* weight = zeroed_scratch<RmsNormGatedArgs>(3 * width);
  float* x = weight + width;
  float* z = x + width;
  load_row(args.weight.dtype, args.weight.data, args.V, weight);
  for (int64_t i = begin_row; i < end_row; ++i) {
    const int64_t token = i / args.HV;
    const int64_t head = i % args.HV;
    load_row(args.x.dtype, args.x.at(token, head), args.V, x);
    load_row(args.z.dtype, args.z.at(token, head), args.V, z);
    norm_row(x, weight, args.V, args.eps, z);
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
