// SPDX-License-Identifier: Apache-2.0
// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b).
//
// Loop: token -> head lanes. Rounding: inputs are widened exactly, everything is f32. The same functions of one lane as
// in packed decode, so both give the same bits.
#include "core/kernels/cpu/gdn_gating.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/gdn_gating.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

void gdn_gating(const GdnGatingArgs& args, int64_t begin_token, int64_t end_token) {
  const F32 d;
  const size_t width = padded(args.HV);
  // Lanes past the last head are computed and dropped.
  float* rate = zeroed_scratch<GdnGatingArgs>(4 * width);
  float* dt_bias = rate + width;
  float* a = dt_bias + width;
  float* b = a + width;
  load_row(args.A_log.dtype, args.A_log.data, args.HV, rate);
  load_row(args.dt_bias.dtype, args.dt_bias.data, args.HV, dt_bias);
  for (size_t i = 0; i < width; i += hn::Lanes(d)) hn::Store(decay_rate(d, hn::Load(d, rate + i)), d, rate + i);

  for (int64_t t = begin_token; t < end_token; ++t) {
    load_row(args.a.dtype, args.a.at(t, 0), args.HV, a);
    load_row(args.b.dtype, args.b.at(t, 0), args.HV, b);
    for (size_t i = 0; i < width; i += hn::Lanes(d)) {
      hn::Store(log_decay(d, hn::Load(d, a + i), hn::Load(d, rate + i), hn::Load(d, dt_bias + i)), d, a + i);
      hn::Store(sigmoid(d, hn::Load(d, b + i)), d, b + i);
    }
    store_row(args.g.dtype, a, args.HV, args.g.at(t, 0));
    store_row(args.beta.dtype, b, args.HV, args.beta.at(t, 0));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(gdn_gating);

void gdn_gating(const GdnGatingArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(gdn_gating)(args, begin_token, end_token);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
