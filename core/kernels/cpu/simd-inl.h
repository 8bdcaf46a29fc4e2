// SPDX-License-Identifier: Apache-2.0
// What the CPU kernels share inside one instruction set: rows to and from f32, exp, sigmoid, softplus, scratch memory.
// Rounding: 16-bit types are widened exactly and rounded to nearest even once; NaN stays NaN. The functions of one
// lane are the same bits in every lane and for every vector width.
#if defined(XGDN_CORE_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_SIMD_INL_H_
#undef XGDN_CORE_KERNELS_CPU_SIMD_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstring>
#include <memory>
#include <new>

#include "core/kernels/args.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, so that head dims, which are multiples of 16, have no tail.
inline constexpr size_t kMaxLanes = 16;
using F32 = hn::CappedTag<float, kMaxLanes>;
using I32 = hn::RebindToSigned<F32>;
using U32 = hn::RebindToUnsigned<F32>;
using U16 = hn::Rebind<uint16_t, F32>;
using VF = hn::Vec<F32>;

// A pool of this element type holds bf16.
using BFloat16Bits = uint16_t;

// The same where the processor rounds to bf16 itself (AVX-512-BF16).
enum HardwareBFloat16 : uint16_t {};

// ---- one vector to and from f32 -------------------------------------------------------------------------------------

HWY_INLINE VF load(F32 d, const float* p) {
  return hn::LoadU(d, p);
}

HWY_INLINE VF load(F32 d, const BFloat16Bits* p) {
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(U32(), hn::LoadU(U16(), p))));
}

HWY_INLINE void store(F32 d, VF x, float* p) {
  hn::StoreU(x, d, p);
}

// A value below 2^16 in every lane.
HWY_INLINE void store_low_halves(hn::Vec<U32> x, uint16_t* p) {
  hn::StoreU(hn::DemoteTo(U16(), hn::BitCast(I32(), x)), U16(), p);
}

// The upper half of each lane is x as bf16; the lower half has no meaning. A NaN keeps its upper half, which holds the
// quiet bit: x comes from arithmetic or was widened from 16 bits.
HWY_INLINE hn::Vec<U32> round_to_upper_half(VF x) {
  const U32 u;
  const auto bits = hn::BitCast(u, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(u, 0x7FFF)));
  return hn::IfThenElse(hn::RebindMask(u, hn::IsNaN(x)), bits, rounded);
}

HWY_INLINE void store(F32, VF x, BFloat16Bits* p) {
  store_low_halves(hn::ShiftRight<16>(round_to_upper_half(x)), p);
}

// Keeps GCC from loading x again for each product that it is a factor of.
HWY_INLINE void keep_in_register([[maybe_unused]] VF& x) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR
  asm("" : "+x"(x.raw));
#endif
}

// ---- two vectors to and from f32 ------------------------------------------------------------------------------------
// Of f32 the first and the second half of 2 * lanes elements; of bf16 the even and the odd ones, which takes no
// shuffle. A pool's rows are always worked on in its own order.

HWY_INLINE void load_pair(F32 d, const float* p, VF& first, VF& second) {
  first = hn::LoadU(d, p);
  second = hn::LoadU(d, p + hn::Lanes(d));
}

// Stores the pair and leaves in it what was stored, rounded.
HWY_INLINE void store_pair(F32 d, VF& first, VF& second, float* p) {
  hn::StoreU(first, d, p);
  hn::StoreU(second, d, p + hn::Lanes(d));
}

HWY_INLINE void store_rounded(F32 d, VF& x, float* p) {
  hn::StoreU(x, d, p);
}

HWY_INLINE void store_rounded(F32 d, VF& x, BFloat16Bits* p) {
  store(d, x, p);
  x = load(d, p);
}

#if HWY_TARGET == HWY_SCALAR  // its vectors hold one element of any type

HWY_INLINE void load_pair(F32 d, const BFloat16Bits* p, VF& first, VF& second) {
  first = load(d, p);
  second = load(d, p + 1);
}

HWY_INLINE void store_pair(F32 d, VF& first, VF& second, BFloat16Bits* p) {
  store_rounded(d, first, p);
  store_rounded(d, second, p + 1);
}

#else

using U16Pairs = hn::Repartition<uint16_t, F32>;

HWY_INLINE void load_pair(F32 d, const BFloat16Bits* p, VF& first, VF& second) {
  const U32 u;
  const auto both = hn::BitCast(u, hn::LoadU(U16Pairs(), p));
  first = hn::BitCast(d, hn::ShiftLeft<16>(both));
  second = hn::BitCast(d, hn::And(both, hn::Set(u, 0xFFFF0000)));
}

HWY_INLINE void store_pair(F32 d, VF& first, VF& second, BFloat16Bits* p) {
  const U32 u;
  const U16Pairs pairs;
  const auto even = round_to_upper_half(first);
  const auto odd = round_to_upper_half(second);
  hn::StoreU(hn::OddEven(hn::BitCast(pairs, odd), hn::BitCast(pairs, hn::ShiftRight<16>(even))), pairs, p);
  first = hn::BitCast(d, hn::And(even, hn::Set(u, 0xFFFF0000)));
  second = hn::BitCast(d, hn::And(odd, hn::Set(u, 0xFFFF0000)));
}

#endif

// Highway 1.0.3 has no target for AVX-512-BF16. Rounding by integers takes 12 instructions a pair of vectors, this 2;
// in cache, a decode step of bf16 states takes 57 us instead of 78 (one sequence, H = 16, HV = 32, K = V = 128).
#undef XGDN_HARDWARE_BFLOAT16
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
#define XGDN_HARDWARE_BFLOAT16

HWY_INLINE VF load(F32 d, const HardwareBFloat16* p) {
  return load(d, reinterpret_cast<const BFloat16Bits*>(p));
}

HWY_INLINE void load_pair(F32 d, const HardwareBFloat16* p, VF& first, VF& second) {
  load_pair(d, reinterpret_cast<const BFloat16Bits*>(p), first, second);
}

HWY_INLINE void store(F32 d, VF x, HardwareBFloat16* p) {
  store(d, x, reinterpret_cast<BFloat16Bits*>(p));
}

HWY_INLINE void store_rounded(F32 d, VF& x, HardwareBFloat16* p) {
  store_rounded(d, x, reinterpret_cast<BFloat16Bits*>(p));
}

// As with integers, but numbers below 2^-126 become zero.
HWY_INLINE void store_pair(F32 d, VF& first, VF& second, HardwareBFloat16* p) {
  alignas(64) static constexpr uint16_t kInterleaved[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i halves;  // all of first, then all of second
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(second.raw), "v"(first.raw));
  const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves);
  _mm512_storeu_si512(p, pairs);
  const U32 u;
  const hn::Vec<U32> both{pairs};
  first = hn::BitCast(d, hn::ShiftLeft<16>(both));
  second = hn::BitCast(d, hn::And(both, hn::Set(u, 0xFFFF0000)));
}

#endif

// Calls f(State()) with the element type that serves a pool.
template <class F>
void with_state_type(DType dtype, const F& f) {
  if (dtype != DType::kBFloat16) {
    f(float());
    return;
  }
#ifdef XGDN_HARDWARE_BFLOAT16
  if (__builtin_cpu_supports("avx512bf16")) {
    f(HardwareBFloat16());
    return;
  }
#endif
  f(BFloat16Bits());
}

// ---- half precision -------------------------------------------------------------------------------------------------

HWY_INLINE VF load_float16(F32 d, const uint16_t* p) {
  const U32 u;
  const auto half = hn::PromoteTo(u, hn::LoadU(U16(), p));
  const auto sign = hn::ShiftLeft<16>(hn::And(half, hn::Set(u, 0x8000)));
  const auto magnitude = hn::And(half, hn::Set(u, 0x7FFF));
  // Normal numbers: move the fraction, rebias the exponent; infinity and NaN: the largest exponent.
  const auto is_special = hn::Gt(magnitude, hn::Set(u, 0x7BFF));
  const auto bias =
      hn::IfThenElse(is_special, hn::Set(u, uint32_t{255 - 31} << 23), hn::Set(u, uint32_t{127 - 15} << 23));
  const auto normal = hn::Add(hn::ShiftLeft<13>(magnitude), bias);
  // Subnormal numbers count units of 2^-24.
  const VF units = hn::ConvertTo(d, hn::BitCast(I32(), magnitude));
  const auto subnormal = hn::BitCast(u, hn::Mul(units, hn::Set(d, 0x1p-24f)));
  const auto is_subnormal = hn::Lt(magnitude, hn::Set(u, 0x0400));
  return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(is_subnormal, subnormal, normal)));
}

HWY_INLINE void store_float16(F32 d, VF x, uint16_t* p) {
  const U32 u;
  const auto bits = hn::BitCast(u, x);
  const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 0x8000));
  const auto magnitude = hn::And(bits, hn::Set(u, 0x7FFFFFFF));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(u, 1));
  const auto rebias = hn::Set(u, (uint32_t{127 - 15} << 23) - 0xFFF);
  const auto normal = hn::ShiftRight<13>(hn::Sub(hn::Add(magnitude, odd), rebias));
  // Below 2^-14: adding 0.5 leaves units of 2^-24 in the fraction, rounded by the addition.
  const auto half = hn::Set(u, uint32_t{126} << 23);
  const auto shifted = hn::Add(hn::BitCast(d, magnitude), hn::BitCast(d, half));
  const auto subnormal = hn::Sub(hn::BitCast(u, shifted), half);
  const auto is_nan = hn::Gt(magnitude, hn::Set(u, 0x7F800000));
  const auto special = hn::IfThenElse(is_nan, hn::Set(u, 0x7E00), hn::Set(u, 0x7C00));
  const auto is_subnormal = hn::Lt(magnitude, hn::Set(u, uint32_t{127 - 14} << 23));
  const auto is_special = hn::Gt(magnitude, hn::Set(u, (uint32_t{127 + 16} << 23) - 1));
  const auto finite = hn::IfThenElse(is_subnormal, subnormal, normal);
  store_low_halves(hn::Or(sign, hn::IfThenElse(is_special, special, finite)), p);
}

enum Float16Bits : uint16_t {};

HWY_INLINE VF load(F32 d, const Float16Bits* p) {
  return load_float16(d, reinterpret_cast<const uint16_t*>(p));
}

HWY_INLINE void store(F32 d, VF x, Float16Bits* p) {
  store_float16(d, x, reinterpret_cast<uint16_t*>(p));
}

// Calls f(Element()) with the type of elements that are loaded and stored by vectors.
template <class F>
HWY_INLINE void with_element_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kBFloat16:
      return f(BFloat16Bits());
    case DType::kFloat16:
      return f(Float16Bits());
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// The first n elements if there are fewer than lanes, and zeros behind them.
template <class Element>
HWY_INLINE VF load_part(F32 d, const Element* p, size_t n) {
  if (n >= hn::Lanes(d)) return load(d, p);
  Element part[kMaxLanes] = {};
  std::memcpy(part, p, n * sizeof(Element));
  return load(d, part);
}

template <class Element>
HWY_INLINE void store_part(F32 d, VF x, Element* p, size_t n) {
  if (n >= hn::Lanes(d)) return store(d, x, p);
  Element part[kMaxLanes];
  store(d, x, part);
  std::memcpy(p, part, n * sizeof(Element));
}

// Memory behind the first n floats stays.
inline void load_row(DType dtype, const void* from, size_t n, float* HWY_RESTRICT to) {
  const F32 d;
  with_element_type(dtype, [&](auto element) HWY_ATTR {
    const auto* p = static_cast<const decltype(element)*>(from);
    for (size_t i = 0; i < n; i += hn::Lanes(d)) store_part(d, load_part(d, p + i, n - i), to + i, n - i);
  });
}

inline void store_row(DType dtype, const float* HWY_RESTRICT from, size_t n, void* to) {
  const F32 d;
  with_element_type(dtype, [&](auto element) HWY_ATTR {
    auto* p = static_cast<decltype(element)*>(to);
    for (size_t i = 0; i < n; i += hn::Lanes(d)) store_part(d, load_part(d, from + i, n - i), p + i, n - i);
  });
}

// Rounds a row of padded(n) elements as a store and a load would.
inline void round_row(DType dtype, size_t n, float* HWY_RESTRICT x) {
  const F32 d;
  uint16_t half[kMaxLanes];
  if (dtype == DType::kFloat32) return;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const VF xi = hn::LoadU(d, x + i);
    if (dtype == DType::kBFloat16) {
      const U32 u;
      hn::StoreU(hn::BitCast(d, hn::And(round_to_upper_half(xi), hn::Set(u, 0xFFFF0000))), d, x + i);
    } else {
      store_float16(d, xi, half);
      hn::StoreU(load_float16(d, half), d, x + i);
    }
  }
}

inline float load_scalar(DType dtype, const void* from) {
  float x = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&x, from, sizeof(float));
  } else {
    load_row(dtype, from, 1, &x);
  }
  return x;
}

// ---- functions of one lane ------------------------------------------------------------------------------------------

// e^x = p 2^n with n whole and p in [2^-0.5, 2^0.5].
HWY_INLINE void split_exp(F32 d, VF x, VF& p, VF& n) {
  n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504f)));
  // ln 2 in two parts: n times the first is exact.
  const VF high = hn::NegMulAdd(n, hn::Set(d, 0.693145752f), x);
  const VF r = hn::NegMulAdd(n, hn::Set(d, 1.42860677e-6f), high);
  // 1 + r + r^2 q(r) is within 3e-9 of e^r there: q's least largest error.
  p = hn::Set(d, 1.38145802e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 8.36872589e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.16683890e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.166665211f));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5f));
  p = hn::MulAdd(hn::Mul(p, r), r, r);
  p = hn::Add(p, hn::Set(d, 1.0f));
}

// p 2^n of a whole n, |n| <= 252, and a p near 1, rounded once; 0 and infinity where it leaves f32.
HWY_INLINE VF multiply_by_power(F32 d, VF p, VF n) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  (void)d;
  return VF{_mm512_scalef_ps(p.raw, n.raw)};
#else
  const I32 i;  // 2^n as two factors, each a normal number
  const auto whole = hn::ConvertTo(i, n);
  const auto half = hn::ShiftRight<1>(whole);
  const auto power = [&](hn::Vec<I32> e)
                         HWY_ATTR { return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(e, hn::Set(i, 127)))); };
  return hn::Mul(hn::Mul(p, power(half)), power(hn::Sub(whole, half)));
#endif
}

// NaN stays.
HWY_INLINE VF clamp(F32 d, VF x, float least, float most) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR  // of two numbers that cannot be compared, x86 takes the second
  return hn::Max(hn::Set(d, least), hn::Min(hn::Set(d, most), x));
#else
  const VF below = hn::IfThenElse(hn::Gt(x, hn::Set(d, most)), hn::Set(d, most), x);
  return hn::IfThenElse(hn::Lt(below, hn::Set(d, least)), hn::Set(d, least), below);
#endif
}

// e^x to about one unit in the last place; 0 and infinity where it leaves f32.
HWY_INLINE VF exp(F32 d, VF x) {
  VF p, n;
  split_exp(d, clamp(d, x, -120.0f, 100.0f), p, n);
  return multiply_by_power(d, p, n);
}

HWY_INLINE VF sigmoid(F32 d, VF x) {
  const VF one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, exp(d, hn::Neg(x))));
}

HWY_INLINE VF silu(F32 d, VF x) {
  return hn::Div(x, hn::Add(hn::Set(d, 1.0f), exp(d, hn::Neg(x))));
}

// log(1 + e^x) = max(x, 0) + log1p(y), y = e^-|x| <= 1;  log1p(y) = 2 artanh(s), s = y / (2 + y) <= 1/3.
HWY_INLINE VF softplus(F32 d, VF x) {
  const VF y = exp(d, hn::Neg(hn::Abs(x)));
  const VF s = hn::Div(y, hn::Add(y, hn::Set(d, 2.0f)));
  const VF s2 = hn::Mul(s, s);
  VF p = hn::Set(d, 1.0f / 15);
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 13));
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 11));
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 9));
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 7));
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 5));
  p = hn::MulAdd(p, s2, hn::Set(d, 1.0f / 3));
  const VF artanh = hn::MulAdd(hn::Mul(p, s2), s, s);
  const VF positive = hn::IfThenElse(hn::Gt(x, hn::Zero(d)), x, hn::Zero(d));
  return hn::MulAdd(hn::Set(d, 2.0f), artanh, positive);
}

// g = rate softplus(a + dt_bias), rate = -exp(A_log); beta = sigmoid(b)
HWY_INLINE VF decay_rate(F32 d, VF A_log) {
  return hn::Neg(exp(d, A_log));
}

HWY_INLINE VF log_decay(F32 d, VF a, VF rate, VF dt_bias) {
  return hn::Mul(rate, softplus(d, hn::Add(a, dt_bias)));
}

// ---- constants of the delta rule ------------------------------------------------------------------------------------

inline constexpr float kNearOne = -0.5f;  // a gate above it acts as alpha - 1: rounding alpha would bias a slow decay
inline constexpr float kNormEps = 1e-6f;  // of the l2norm

// ---- memory ---------------------------------------------------------------------------------------------------------

// kIsWritten: 1 for what is written next, else 0. kLocality: 3 for the first-level cache, 2 for the second.
template <int kIsWritten = 0, int kLocality = 3>
HWY_INLINE void prefetch(const void* from, size_t bytes) {
  constexpr size_t kCacheLine = 64;
  for (size_t i = 0; i < bytes; i += kCacheLine) {
    __builtin_prefetch(static_cast<const char*>(from) + i, kIsWritten, kLocality);
  }
}

inline constexpr size_t kScratchAlignment = 128;  // a pair of cache lines, and any vector

inline size_t padded(int64_t n) {
  return (static_cast<size_t>(n) + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
}

struct AlignedDelete {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{kScratchAlignment}); }
};

// Memory of this thread, one piece per owner, that lives until the thread ends. Grows to the largest request.
template <class Owner>
float* scratch(size_t floats) {
  thread_local std::unique_ptr<float[], AlignedDelete> memory;
  thread_local size_t capacity = 0;
  if (capacity < floats) {
    memory.reset(new (std::align_val_t{kScratchAlignment}) float[floats]);
    capacity = floats;
  }
  return memory.get();
}

template <class Owner>
float* zeroed_scratch(size_t floats) {
  float* memory = scratch<Owner>(floats);
  std::memset(memory, 0, floats * sizeof(float));
  return memory;
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_SIMD_INL_H_
