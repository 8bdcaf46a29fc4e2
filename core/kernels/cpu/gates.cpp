// SPDX-License-Identifier: Apache-2.0
// out = silu(gate) * up, of an MLP;  out = x * sigmoid(gate), of attention.
//
// Loop: row -> piece of it -> lanes. Rounding: inputs are widened exactly, all is f32, out is rounded once.
#include "core/kernels/cpu/gates.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/gates.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

template <bool kIsSilu>
void gate_row(DType dtype, int64_t width, const void* gate, const void* x, void* out) {
  constexpr int64_t kPiece = 256;  // stays in the first-level cache
  const F32 d;
  HWY_ALIGN float g[kPiece] = {};
  HWY_ALIGN float gated[kPiece] = {};
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int64_t count = std::min(kPiece, width - begin);
    const int64_t offset = begin * size_of(dtype);
    load_row(dtype, static_cast<const char*>(gate) + offset, count, g);
    load_row(dtype, static_cast<const char*>(x) + offset, count, gated);
    for (size_t j = 0; j < padded(count); j += hn::Lanes(d)) {
      const VF gj = hn::Load(d, g + j);
      const VF factor = kIsSilu ? silu(d, gj) : sigmoid(d, gj);
      hn::Store(hn::Mul(factor, hn::Load(d, gated + j)), d, gated + j);
    }
    store_row(dtype, gated, count, static_cast<char*>(out) + offset);
  }
}

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token) {
  for (int64_t token = begin_token; token < end_token; ++token) {
    gate_row<true>(args.out.dtype, args.I, args.gate.at(token, 0), args.up.at(token, 0), args.out.at(token, 0));
  }
}

void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t begin_row, int64_t end_row) {
  for (int64_t i = begin_row; i < end_row; ++i) {
    const int64_t token = i / args.H;
    const int64_t head = i % args.H;
    gate_row<false>(args.out.dtype, args.D, args.gate.at(token, head), args.x.at(token, head),
                    args.out.at(token, head));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(silu_and_mul);
HWY_EXPORT(sigmoid_and_mul);

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(silu_and_mul)(args, begin_token, end_token);
}

void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t begin_row, int64_t end_row) {
  HWY_DYNAMIC_DISPATCH(sigmoid_and_mul)(args, begin_row, end_row);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
