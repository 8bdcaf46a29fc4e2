// SPDX-License-Identifier: Apache-2.0
// The scale with which a group of numbers is rounded to integers.
#if defined(XGDN_CORE_KERNELS_CPU_GROUP_SCALE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_GROUP_SCALE_INL_H_
#undef XGDN_CORE_KERNELS_CPU_GROUP_SCALE_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_GROUP_SCALE_INL_H_
#endif

#include <cstring>
#include <limits>

#include "core/kernels/cpu/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// x is about scale * round(inverse * x).
struct GroupScale {
  float scale;    // NaN where a number is infinite or NaN
  float inverse;  // 0 where all integers are
};

// The bits of the largest magnitude, which order as the magnitudes do, and NaN above all.
inline int32_t largest_bits(const float* HWY_RESTRICT x, size_t count) {
  const I32 i;
  const F32 d;
  auto largest = hn::Zero(i);
  for (size_t j = 0; j < count; j += hn::Lanes(d)) {
    largest = hn::Max(largest, hn::BitCast(i, hn::Abs(hn::LoadU(d, x + j))));
  }
  return hn::GetLane(hn::MaxOfLanes(i, largest));
}

// Makes the largest magnitude of whole vectors of numbers the integer `most`.
inline GroupScale group_scale(const float* HWY_RESTRICT x, size_t count, float most) {
  constexpr int32_t kInfinity = 0x7F800000;
  constexpr float kSmallest = 0x1p-100f;  // below, the reciprocal leaves f32
  const int32_t bits = largest_bits(x, count);
  if (bits >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  if (largest < kSmallest) return {0.0f, 0.0f};
  return {largest / most, most / largest};
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_GROUP_SCALE_INL_H_
