// SPDX-License-Identifier: Apache-2.0
// out = silu(gate) * up.
//
// Loop: token -> piece of a row -> lanes. Rounding: inputs are widened exactly, all is f32, out is rounded once.
#include "core/kernels/cpu/silu_and_mul.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/silu_and_mul.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token) {
  constexpr int64_t kPiece = 256;  // stays in the first-level cache
  const F32 d;
  HWY_ALIGN float gate[kPiece] = {};
  HWY_ALIGN float up[kPiece] = {};
  for (int64_t token = begin_token; token < end_token; ++token) {
    for (int64_t begin = 0; begin < args.I; begin += kPiece) {
      const int64_t count = std::min(kPiece, args.I - begin);
      load_row(args.gate.dtype, args.gate.at(token, begin), count, gate);
      load_row(args.up.dtype, args.up.at(token, begin), count, up);
      for (size_t j = 0; j < padded(count); j += hn::Lanes(d)) {
        const VF x = hn::Load(d, gate + j);
        hn::Store(hn::Mul(hn::Mul(x, sigmoid(d, x)), hn::Load(d, up + j)), d, gate + j);
      }
      store_row(args.out.dtype, gate, count, args.out.at(token, begin));
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(silu_and_mul);

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(silu_and_mul)(args, begin_token, end_token);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
