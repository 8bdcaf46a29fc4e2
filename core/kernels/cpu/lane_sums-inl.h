// SPDX-License-Identifier: Apache-2.0
// Sums over the lanes of sixteen vectors at once, where a vector has sixteen lanes.
#if defined(XGDN_CORE_KERNELS_CPU_LANE_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_LANE_SUMS_INL_H_
#undef XGDN_CORE_KERNELS_CPU_LANE_SUMS_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_LANE_SUMS_INL_H_
#endif

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

#ifdef XGDN_HARDWARE_BFLOAT16

// The first and the second, the third and the fourth four lanes of x, then those of y.
HWY_INLINE __m512 add_fours(__m512 x, __m512 y) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
}

// Of each four lanes of four rows the sum, row after row: lanes i and i + 2 first, then the two of them.
HWY_INLINE __m512 sum_fours(__m512 row0, __m512 row1, __m512 row2, __m512 row3) {
  const __m512d rows01 =
      _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(row0, row1), _mm512_unpackhi_ps(row0, row1)));
  const __m512d rows23 =
      _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(row2, row3), _mm512_unpackhi_ps(row2, row3)));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(rows01, rows23)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(rows01, rows23)));
}

// The sums of sixteen rows, given those of their fours.
HWY_INLINE __m512 sum_of_fours(const __m512 (&fours)[4]) {
  return add_fours(add_fours(fours[0], fours[1]), add_fours(fours[2], fours[3]));
}

// sums[row] of lanes + row * stride, both aligned.
HWY_INLINE void sum_lanes_of_sixteen(const float* HWY_RESTRICT lanes, size_t stride, float* HWY_RESTRICT sums) {
  __m512 fours[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const float* of_rows = lanes + 4 * i * stride;
    fours[i] = sum_fours(_mm512_load_ps(of_rows), _mm512_load_ps(of_rows + stride),
                         _mm512_load_ps(of_rows + 2 * stride), _mm512_load_ps(of_rows + 3 * stride));
  }
  _mm512_storeu_ps(sums, sum_of_fours(fours));
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_LANE_SUMS_INL_H_
