// SPDX-License-Identifier: Apache-2.0
// What the RMS norms share inside one instruction set.
//
// Rounding: all is f32. Order of the sum: lane i adds elements i, i + lanes, ... ascending, then the lanes.
#if defined(XGDN_CORE_KERNELS_CPU_RMS_NORM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_RMS_NORM_INL_H_
#undef XGDN_CORE_KERNELS_CPU_RMS_NORM_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_RMS_NORM_INL_H_
#endif

#include <cmath>

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// 1 / sqrt(mean(x^2) + eps) of n elements, in every lane. The row is padded(n) long, with zeros past n.
HWY_INLINE VF inverse_rms(const float* HWY_RESTRICT x, int64_t n, float eps) {
  const F32 d;
  VF squares = hn::Zero(d);
  for (size_t j = 0; j < padded(n); j += hn::Lanes(d)) {
    const VF xj = hn::Load(d, x + j);
    squares = hn::MulAdd(xj, xj, squares);
  }
  const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(n);
  return hn::Set(d, 1.0f / std::sqrt(mean + eps));
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_RMS_NORM_INL_H_
