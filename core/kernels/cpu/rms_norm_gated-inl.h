// SPDX-License-Identifier: Apache-2.0
// A row of the gated RMS norm, inside one instruction set: shared by the op and the fused decode step, so that they
// give the same bits.
//
// Rounding: all is f32. Order of the sum: lane i adds elements i, i + lanes, ... ascending, then the lanes.
#if defined(XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#undef XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#endif

#include <cmath>

#include "core/kernels/cpu/rms_norm_gated.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// z <- weight * (x / rms(x)) * silu(z). The rows are padded(V) long, with zeros past V, which stay zeros.
inline void norm_row(const float* HWY_RESTRICT x, const float* HWY_RESTRICT weight, int64_t V, float eps,
                     float* HWY_RESTRICT z) {
  const F32 d;
  const size_t width = padded(V);
  VF squares = hn::Zero(d);
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    const VF xj = hn::Load(d, x + j);
    squares = hn::MulAdd(xj, xj, squares);
  }
  const float mean = hn::GetLane(hn::SumOfLanes(d, squares)) / static_cast<float>(V);
  const VF inverse_rms = hn::Set(d, 1.0f / std::sqrt(mean + eps));
  for (size_t j = 0; j < width; j += hn::Lanes(d)) {
    const VF zj = hn::Load(d, z + j);
    const VF gate = hn::Mul(zj, sigmoid(d, zj));
    const VF normed = hn::Mul(hn::Mul(hn::Load(d, x + j), inverse_rms), hn::Load(d, weight + j));
    hn::Store(hn::Mul(normed, gate), d, z + j);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
