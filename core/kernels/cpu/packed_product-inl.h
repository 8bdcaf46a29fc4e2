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

// Rows at once of two vectors: what 16 registers leave room for, or 32.
#if HWY_ARCH_X86 && HWY_TARGET > HWY_AVX3
inline constexpr size_t kRowsAtOnce = 6;
#else
inline constexpr size_t kRowsAtOnce = 8;
#endif

// Columns of C that are computed together: one vector, or two that lie so far apart.
struct Columns {
  size_t first = 0;  // of all panels
  size_t b_second = 0;
  size_t c_second = 0;
};

template <size_t kRows, bool kTwoVectors>
HWY_INLINE void multiply_rows(const Product<float>& p, size_t row, const Columns& columns) {
  static_assert(kRows >= 1 && kRows <= 8);
  const F32 d;
  const size_t panel = columns.first / kPanel;
  float* HWY_RESTRICT c = p.c + panel * p.c_stride + row * kPanel + columns.first % kPanel;
  float* HWY_RESTRICT e = c + columns.c_second;
  const auto sum = [&](const float* from, size_t r)
                       HWY_ATTR { return p.accumulate && r < kRows ? hn::LoadU(d, from + r * kPanel) : hn::Zero(d); };
  VF c0 = sum(c, 0), c1 = sum(c, 1), c2 = sum(c, 2), c3 = sum(c, 3);
  VF c4 = sum(c, 4), c5 = sum(c, 5), c6 = sum(c, 6), c7 = sum(c, 7);
  VF e0 = hn::Zero(d), e1 = e0, e2 = e0, e3 = e0, e4 = e0, e5 = e0, e6 = e0, e7 = e0;
  if constexpr (kTwoVectors) {
    e0 = sum(e, 0), e1 = sum(e, 1), e2 = sum(e, 2), e3 = sum(e, 3);
    e4 = sum(e, 4), e5 = sum(e, 5), e6 = sum(e, 6), e7 = sum(e, 7);
  }
  for (size_t t = 0; t < p.num_terms; ++t) {
    const size_t s = p.a_stride;
    const float* HWY_RESTRICT a = p.terms[t].a + row * s;
    const float* HWY_RESTRICT b = p.terms[t].b + panel * p.b_stride + columns.first % kPanel;
    for (size_t i = 0; i < p.terms[t].depth; ++i, ++a, b += kPanel) {
      const VF bi = hn::LoadU(d, b);
      const VF di = kTwoVectors ? hn::LoadU(d, b + columns.b_second) : bi;
      const auto add = [&](size_t r, VF& c_row, VF& e_row) HWY_ATTR {
        const VF ar = hn::Set(d, a[r * s]);
        c_row = hn::MulAdd(ar, bi, c_row);
        if constexpr (kTwoVectors) e_row = hn::MulAdd(ar, di, e_row);
      };
      add(0, c0, e0);
      if constexpr (kRows > 1) add(1, c1, e1);
      if constexpr (kRows > 2) add(2, c2, e2);
      if constexpr (kRows > 3) add(3, c3, e3);
      if constexpr (kRows > 4) add(4, c4, e4);
      if constexpr (kRows > 5) add(5, c5, e5);
      if constexpr (kRows > 6) add(6, c6, e6);
      if constexpr (kRows > 7) add(7, c7, e7);
    }
  }
  const auto keep = [&](size_t r, VF c_row, VF e_row) HWY_ATTR {
    if (r >= kRows) return;
    hn::StoreU(c_row, d, c + r * kPanel);
    if constexpr (kTwoVectors) hn::StoreU(e_row, d, e + r * kPanel);
  };
  keep(0, c0, e0), keep(1, c1, e1), keep(2, c2, e2), keep(3, c3, e3);
  keep(4, c4, e4), keep(5, c5, e5), keep(6, c6, e6), keep(7, c7, e7);
}

template <bool kTwoVectors>
HWY_INLINE void multiply_columns(const Product<float>& p, const Columns& columns) {
  size_t row = 0;
  for (; row + kRowsAtOnce <= p.rows; row += kRowsAtOnce) multiply_rows<kRowsAtOnce, kTwoVectors>(p, row, columns);
  switch (p.rows - row) {
    case 1:
      return multiply_rows<1, kTwoVectors>(p, row, columns);
    case 2:
      return multiply_rows<2, kTwoVectors>(p, row, columns);
    case 3:
      return multiply_rows<3, kTwoVectors>(p, row, columns);
    case 4:
      return multiply_rows<4, kTwoVectors>(p, row, columns);
    case 5:
      return multiply_rows<5, kTwoVectors>(p, row, columns);
    case 6:
      return multiply_rows<6, kTwoVectors>(p, row, columns);
    case 7:
      return multiply_rows<7, kTwoVectors>(p, row, columns);
    default:
      return;
  }
}

inline void multiply(const Product<float>& p) {
  const size_t lanes = hn::Lanes(F32());
  size_t column = 0;
  if (lanes < kPanel) {  // both vectors are in one panel
    for (; column < p.panels * kPanel; column += 2 * lanes) multiply_columns<true>(p, {column, lanes, lanes});
    return;
  }
  for (; column + 2 * kPanel <= p.panels * kPanel; column += 2 * kPanel) {
    multiply_columns<true>(p, {column, p.b_stride, p.c_stride});
  }
  if (column < p.panels * kPanel) multiply_columns<false>(p, {column, 0, 0});
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
