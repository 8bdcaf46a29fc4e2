// SPDX-License-Identifier: Apache-2.0
// Operands and f32 products of packed_product.h inside one instruction set: packing, terms, transposition.
#if defined(XGDN_CORE_KERNELS_CPU_PACKED_PRODUCT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_PACKED_PRODUCT_INL_H_
#undef XGDN_CORE_KERNELS_CPU_PACKED_PRODUCT_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_PACKED_PRODUCT_INL_H_
#endif

#include <algorithm>

#include "core/kernels/cpu/packed_product.h"
#include "core/kernels/cpu/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// ---- operands -------------------------------------------------------------------------------------------------------

// The upper halves of x as numbers.
HWY_INLINE VF upper_half(F32 d, VF x) {
  return hn::BitCast(d, hn::And(hn::BitCast(U32(), x), hn::Set(U32(), 0xFFFF0000u)));
}

// x with its upper half rounded to nearest, ties away from zero. NaN stays NaN unless all its upper bits are set.
HWY_INLINE VF rounded_up(F32 d, VF x) {
  return hn::BitCast(d, hn::Add(hn::BitCast(U32(), x), hn::Set(U32(), 0x8000u)));
}

// Two rows of a panel of B, in kParts parts. Each part is what remains rounded to nearest: the next has a sign of its
// own, so that the product of two last parts, which set_terms leaves out, has no preferred sign either.
template <size_t kParts>
HWY_INLINE void store_pair(F32 d, VF even, VF odd, uint16_t* to, size_t part_stride) {
  const U32 u;
  for (size_t part = 0; part < kParts; ++part) {
    const VF low = rounded_up(d, even);
    const VF high = upper_half(d, rounded_up(d, odd));
    const auto words = hn::Or(hn::ShiftRight<16>(hn::BitCast(u, low)), hn::BitCast(u, high));
    hn::StoreU(words, u, reinterpret_cast<uint32_t*>(to + part * part_stride));
    if (part + 1 == kParts) return;
    even = hn::Sub(even, upper_half(d, low));
    odd = hn::Sub(odd, high);
  }
}

template <size_t kParts>
HWY_INLINE void store_pair(F32 d, VF even, VF odd, float* to, size_t) {
  hn::StoreU(even, d, to);
  hn::StoreU(odd, d, to + kPanel);
}

// Lanes of a row of A.
template <size_t kParts>
HWY_INLINE void store_lanes(F32 d, VF x, uint16_t* to, size_t part_stride) {
  for (size_t part = 0; part < kParts; ++part) {
    const VF rounded = rounded_up(d, x);
    store_low_halves(hn::ShiftRight<16>(hn::BitCast(U32(), rounded)), to + part * part_stride);
    if (part + 1 == kParts) return;
    x = hn::Sub(x, upper_half(d, rounded));
  }
}

template <size_t kParts>
HWY_INLINE void store_lanes(F32 d, VF x, float* to, size_t) {
  hn::StoreU(x, d, to);
}

// Where lane `lane` of rows 2i and 2i + 1 of a panel begins.
HWY_INLINE uint16_t* pair_at(uint16_t* panel, size_t i, size_t lane) {
  return panel + (i * kPanel + lane) * 2;
}
HWY_INLINE float* pair_at(float* panel, size_t i, size_t lane) {
  return panel + i * 2 * kPanel + lane;
}

// All products of parts but those below the last part's rounding, the smallest first.
template <size_t kAParts, size_t kBParts, class Element>
HWY_INLINE void set_terms(Product<Element>& p, size_t depth, const Element* a, size_t a_part, const Element* b,
                          size_t b_part) {
  constexpr size_t kParts = std::max(kAParts, kBParts);
  p.num_terms = 0;
  for (size_t sum = kParts; sum-- > 0;) {
    for (size_t i = std::min(sum + 1, kAParts); i-- > 0;) {
      if (sum - i < kBParts) p.terms[p.num_terms++] = {a + i * a_part, b + (sum - i) * b_part, depth};
    }
  }
}

// ---- products in f32 ------------------------------------------------------------------------------------------------

// 8 rows of one vector of columns, or of the same vector of two panels: eight or sixteen sums in flight.
template <bool kTwoPanels>
HWY_INLINE void multiply_rows(const Product<float>& p, size_t row, size_t column) {
  const F32 d;
  float* HWY_RESTRICT c = p.c + column / kPanel * p.c_stride + row * kPanel + column % kPanel;
  float* HWY_RESTRICT e = c + p.c_stride;
  VF c0 = hn::Zero(d), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
  VF e0 = c0, e1 = c0, e2 = c0, e3 = c0, e4 = c0, e5 = c0, e6 = c0, e7 = c0;
  if (p.accumulate) {
    c0 = hn::LoadU(d, c);
    c1 = hn::LoadU(d, c + kPanel);
    c2 = hn::LoadU(d, c + 2 * kPanel);
    c3 = hn::LoadU(d, c + 3 * kPanel);
    c4 = hn::LoadU(d, c + 4 * kPanel);
    c5 = hn::LoadU(d, c + 5 * kPanel);
    c6 = hn::LoadU(d, c + 6 * kPanel);
    c7 = hn::LoadU(d, c + 7 * kPanel);
    if constexpr (kTwoPanels) {
      e0 = hn::LoadU(d, e);
      e1 = hn::LoadU(d, e + kPanel);
      e2 = hn::LoadU(d, e + 2 * kPanel);
      e3 = hn::LoadU(d, e + 3 * kPanel);
      e4 = hn::LoadU(d, e + 4 * kPanel);
      e5 = hn::LoadU(d, e + 5 * kPanel);
      e6 = hn::LoadU(d, e + 6 * kPanel);
      e7 = hn::LoadU(d, e + 7 * kPanel);
    }
  }
  for (size_t t = 0; t < p.num_terms; ++t) {
    const size_t s = p.a_stride;
    const float* HWY_RESTRICT a = p.terms[t].a + row * s;
    const float* HWY_RESTRICT b = p.terms[t].b + column / kPanel * p.b_stride + column % kPanel;
    for (size_t i = 0; i < p.terms[t].depth; ++i, ++a, b += kPanel) {
      const VF bi = hn::LoadU(d, b);
      const VF a0 = hn::Set(d, a[0]), a1 = hn::Set(d, a[s]), a2 = hn::Set(d, a[2 * s]), a3 = hn::Set(d, a[3 * s]);
      const VF a4 = hn::Set(d, a[4 * s]), a5 = hn::Set(d, a[5 * s]), a6 = hn::Set(d, a[6 * s]),
               a7 = hn::Set(d, a[7 * s]);
      c0 = hn::MulAdd(a0, bi, c0);
      c1 = hn::MulAdd(a1, bi, c1);
      c2 = hn::MulAdd(a2, bi, c2);
      c3 = hn::MulAdd(a3, bi, c3);
      c4 = hn::MulAdd(a4, bi, c4);
      c5 = hn::MulAdd(a5, bi, c5);
      c6 = hn::MulAdd(a6, bi, c6);
      c7 = hn::MulAdd(a7, bi, c7);
      if constexpr (kTwoPanels) {
        const VF di = hn::LoadU(d, b + p.b_stride);
        e0 = hn::MulAdd(a0, di, e0);
        e1 = hn::MulAdd(a1, di, e1);
        e2 = hn::MulAdd(a2, di, e2);
        e3 = hn::MulAdd(a3, di, e3);
        e4 = hn::MulAdd(a4, di, e4);
        e5 = hn::MulAdd(a5, di, e5);
        e6 = hn::MulAdd(a6, di, e6);
        e7 = hn::MulAdd(a7, di, e7);
      }
    }
  }
  hn::StoreU(c0, d, c);
  hn::StoreU(c1, d, c + kPanel);
  hn::StoreU(c2, d, c + 2 * kPanel);
  hn::StoreU(c3, d, c + 3 * kPanel);
  hn::StoreU(c4, d, c + 4 * kPanel);
  hn::StoreU(c5, d, c + 5 * kPanel);
  hn::StoreU(c6, d, c + 6 * kPanel);
  hn::StoreU(c7, d, c + 7 * kPanel);
  if constexpr (kTwoPanels) {
    hn::StoreU(e0, d, e);
    hn::StoreU(e1, d, e + kPanel);
    hn::StoreU(e2, d, e + 2 * kPanel);
    hn::StoreU(e3, d, e + 3 * kPanel);
    hn::StoreU(e4, d, e + 4 * kPanel);
    hn::StoreU(e5, d, e + 5 * kPanel);
    hn::StoreU(e6, d, e + 6 * kPanel);
    hn::StoreU(e7, d, e + 7 * kPanel);
  }
}

inline void multiply(const Product<float>& p) {
  constexpr size_t kRows = 8;
  static_assert(kPanel % kRows == 0);
  const size_t lanes = hn::Lanes(F32());
  size_t panel = 0;
  if (lanes == kPanel) {  // vectors of 16 come with 32 registers
    for (; panel + 2 <= p.panels; panel += 2) {
      for (size_t row = 0; row < p.rows; row += kRows) multiply_rows<true>(p, row, panel * kPanel);
    }
  }
  for (size_t column = panel * kPanel; column < p.panels * kPanel; column += lanes) {
    for (size_t row = 0; row < p.rows; row += kRows) multiply_rows<false>(p, row, column);
  }
}

// ---- transposition --------------------------------------------------------------------------------------------------

// to[c * to_stride + r] = from[r * from_stride + c] for r, c < 4.
HWY_INLINE void transpose_4x4(const uint32_t* from, size_t from_stride, uint32_t* to, size_t to_stride) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t r = 0; r < 4; ++r) {
    for (size_t c = 0; c < 4; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
#else
  const hn::CappedTag<uint32_t, 4> d;
  const hn::Repartition<uint64_t, decltype(d)> d64;
  const auto row0 = hn::LoadU(d, from);
  const auto row1 = hn::LoadU(d, from + from_stride);
  const auto row2 = hn::LoadU(d, from + 2 * from_stride);
  const auto row3 = hn::LoadU(d, from + 3 * from_stride);
  const auto lower01 = hn::BitCast(d64, hn::InterleaveLower(d, row0, row1));
  const auto lower23 = hn::BitCast(d64, hn::InterleaveLower(d, row2, row3));
  const auto upper01 = hn::BitCast(d64, hn::InterleaveUpper(d, row0, row1));
  const auto upper23 = hn::BitCast(d64, hn::InterleaveUpper(d, row2, row3));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, lower01, lower23)), d, to);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, lower01, lower23)), d, to + to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, upper01, upper23)), d, to + 2 * to_stride);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, upper01, upper23)), d, to + 3 * to_stride);
#endif
}

// Rows and columns are multiples of 4.
inline void transpose(const void* from, size_t rows, size_t columns, size_t from_stride, void* to, size_t to_stride) {
  const uint32_t* source = static_cast<const uint32_t*>(from);
  uint32_t* target = static_cast<uint32_t*>(to);
  for (size_t c = 0; c < columns; c += 4) {
    for (size_t r = 0; r < rows; r += 4) {
      transpose_4x4(source + r * from_stride + c, from_stride, target + c * to_stride + r, to_stride);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_PACKED_PRODUCT_INL_H_
