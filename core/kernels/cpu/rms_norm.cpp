// SPDX-License-Identifier: Apache-2.0
// residual <- residual + x;  out = (1 + weight) * (residual / rms(residual)) over the last dimension.
//
// Loop: row -> lanes. Rounding: inputs are widened exactly; the residual is rounded once, and what is normed is the
// rounded sum; out is rounded once; the rest: rms_norm-inl.h.
#include "core/kernels/cpu/rms_norm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/rms_norm.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/rms_norm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// x <- x + residual, rounded, and to the residual as well. The rows are padded(n) long.
void add_residual(const RmsNormArgs& args, void* residual, float* HWY_RESTRICT x, float* HWY_RESTRICT before) {
  const F32 d;
  const size_t width = padded(args.D);
  load_row(args.residual.dtype, residual, args.D, before);
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    hn::Store(hn::Add(hn::Load(d, x + j), hn::Load(d, before + j)), d, x + j);
  }
  round_row(args.residual.dtype, width, x);
  store_row(args.residual.dtype, x, args.D, residual);
}

void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row) {
  const F32 d;
  const size_t width = padded(args.D);
  float* weight = zeroed_scratch<RmsNormArgs>(4 * width);
  float* x = weight + width;
  float* before = x + width;
  float* out = before + width;  // of its own: x stays zero past D, also after a row of NaN
  load_row(args.weight.dtype, args.weight.data, args.D, weight);
  for (int64_t i = begin_row; i < end_row; ++i) {
    const int64_t token = i / args.H;
    const int64_t head = i % args.H;
    load_row(args.x.dtype, args.x.at(token, head), args.D, x);
    if (args.residual.data != nullptr) add_residual(args, args.residual.at(token, head), x, before);
    const VF scale = inverse_rms(x, args.D, args.eps);
    for (size_t j = 0; j < width; j += hn::Lanes(d)) {
      const VF normed = hn::Mul(hn::Load(d, x + j), scale);
      hn::Store(hn::MulAdd(normed, hn::Load(d, weight + j), normed), d, out + j);
    }
    store_row(args.out.dtype, out, args.D, args.out.at(token, head));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(rms_norm);

void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row) {
  HWY_DYNAMIC_DISPATCH(rms_norm)(args, begin_row, end_row);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
