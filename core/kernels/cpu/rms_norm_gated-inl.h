// SPDX-License-Identifier: Apache-2.0
// A row of the gated RMS norm, inside one instruction set: shared by the op and the fused decode step, so that they
// give the same bits. Rounding: all is f32; the order of the sum: rms_norm-inl.h.
#if defined(XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#undef XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
#endif

#include "core/kernels/cpu/rms_norm-inl.h"
#include "core/kernels/cpu/rms_norm_gated.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// z <- weight * (x / rms(x)) * silu(z). The rows are padded(V) long, with zeros past V, which stay zeros.
inline void norm_row(const float* HWY_RESTRICT x, const float* HWY_RESTRICT weight, int64_t V, float eps,
                     float* HWY_RESTRICT z) {
  const F32 d;
  const VF scale = inverse_rms(x, V, eps);
  for (size_t j = 0; j < padded(V); j += hn::Lanes(d)) {
    const VF zj = hn::Load(d, z + j);
    const VF gate = silu(d, zj);
    const VF normed = hn::Mul(hn::Mul(hn::Load(d, x + j), scale), hn::Load(d, weight + j));
    hn::Store(hn::Mul(normed, gate), d, z + j);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_RMS_NORM_GATED_INL_H_
