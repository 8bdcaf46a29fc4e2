// SPDX-License-Identifier: Apache-2.0
// sum = residual + x;  n = (1 + weight) * (sum / rms(sum)) over the last dimension;
// out = n, its first P elements rotated: n * cos + (-n_{i + P/2}, n_i) * sin.
//
// Loop: row -> lanes. Rounding: inputs are widened exactly; the sum is rounded once, and what is normed is the
// rounded sum; out is rounded once, and before it, where n is rotated, n and both products; the rest: rms_norm-inl.h.
#include "core/kernels/cpu/rms_norm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/rms_norm.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/rms_norm-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// x <- x + residual, rounded, and to the sum as well. The rows are padded(n) long.
void add_residual(const RmsNormArgs& args, const void* residual, void* sum, float* HWY_RESTRICT x,
                  float* HWY_RESTRICT before) {
  const F32 d;
  const size_t width = padded(args.D);
  load_row(args.residual.dtype, residual, args.D, before);
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    hn::Store(hn::Add(hn::Load(d, x + j), hn::Load(d, before + j)), d, x + j);
  }
  round_row(args.residual_out.dtype, width, x);
  store_row(args.residual_out.dtype, x, args.D, sum);
}

// Rotates a row [P], half a vector from each half of it. The other rows are memory for P elements each.
void rotate(DType dtype, int64_t P, const float* HWY_RESTRICT cos, const float* HWY_RESTRICT sin, float* HWY_RESTRICT x,
            float* HWY_RESTRICT straight, float* HWY_RESTRICT crossed) {
  const int64_t half = P / 2;
  round_row(dtype, padded(P), x);
  for (int64_t i = 0; i < half; ++i) {
    straight[i] = x[i] * cos[i];
    straight[half + i] = x[half + i] * cos[half + i];
    crossed[i] = -x[half + i] * sin[i];
    crossed[half + i] = x[i] * sin[half + i];
  }
  round_row(dtype, padded(P), straight);
  round_row(dtype, padded(P), crossed);
  for (int64_t i = 0; i < P; ++i) x[i] = straight[i] + crossed[i];
}

void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row) {
  const F32 d;
  const size_t width = padded(args.D);
  const size_t turned = padded(args.P);
  float* weight = zeroed_scratch<RmsNormArgs>(4 * width + 4 * turned);
  float* x = weight + width;
  float* before = x + width;
  float* out = before + width;  // of its own: x stays zero past D, also after a row of NaN
  float* cos = out + width;
  float* sin = cos + turned;
  float* straight = sin + turned;
  float* crossed = straight + turned;
  load_row(args.weight.dtype, args.weight.data, args.D, weight);
  for (int64_t i = begin_row; i < end_row; ++i) {
    const int64_t token = i / args.H;
    const int64_t head = i % args.H;
    load_row(args.x.dtype, args.x.at(token, head), args.D, x);
    if (args.residual.data != nullptr) {
      add_residual(args, args.residual.at(token, head), args.residual_out.at(token, head), x, before);
    }
    const VF scale = inverse_rms(x, args.D, args.eps);
    for (size_t j = 0; j < width; j += hn::Lanes(d)) {
      const VF normed = hn::Mul(hn::Load(d, x + j), scale);
      hn::Store(hn::MulAdd(normed, hn::Load(d, weight + j), normed), d, out + j);
    }
    if (args.P > 0) {
      load_row(args.cos.dtype, args.cos.at(token, 0), args.P, cos);
      load_row(args.sin.dtype, args.sin.at(token, 0), args.P, sin);
      rotate(args.out.dtype, args.P, cos, sin, out, straight, crossed);
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
