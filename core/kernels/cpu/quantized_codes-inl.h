// SPDX-License-Identifier: Apache-2.0
// The formats of quantized_linear.h inside one instruction set. A vector has an output in each 32-bit lane.
//
// int8: a row of a panel holds 4 of D for each output, in bytes 0, 2, 1, 3. The low bytes of both 16-bit halves are a
// pair of neighbours, so are the high ones.
//
// int4: 8 of D. From the lowest bits on, the low half holds 0, 2, 4, 6 and the high one 1, 3, 5, 7: four pairs.
//
// Tokens of 8 bits lie in the order of these bytes, of int4 that of the lower halves before that of the upper ones,
// where instructions multiply bytes.
//
// float8: 2 of D, as they follow each other.
#if defined(XGDN_CORE_KERNELS_CPU_QUANTIZED_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_QUANTIZED_CODES_INL_H_
#undef XGDN_CORE_KERNELS_CPU_QUANTIZED_CODES_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_QUANTIZED_CODES_INL_H_
#endif

#include <cstring>

#include "core/kernels/cpu/quantized_linear.h"
#include "core/kernels/cpu/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

using VI = hn::Vec<I32>;

// ---- pairs of i16 in 32-bit lanes -----------------------------------------------------------------------------------

#if HWY_TARGET == HWY_SCALAR  // its vectors hold one element of any type

HWY_INLINE int16_t half_of(VI pairs, int shift) {
  return static_cast<int16_t>(static_cast<uint32_t>(hn::GetLane(pairs)) >> shift & 0xFFFF);
}
HWY_INLINE VI pair_of(int low, int high) {
  return hn::Set(I32(), static_cast<int32_t>(static_cast<uint32_t>(low & 0xFFFF) | static_cast<uint32_t>(high) << 16));
}

template <int kBits>
HWY_INLINE VI shift_pairs_left(VI pairs) {
  return pair_of(half_of(pairs, 0) << kBits, half_of(pairs, 16) << kBits);
}
template <int kBits>
HWY_INLINE VI shift_pairs_right(VI pairs) {  // with the sign
  return pair_of(half_of(pairs, 0) >> kBits, half_of(pairs, 16) >> kBits);
}
HWY_INLINE VI subtract_pairs(VI a, VI b) {
  return pair_of(half_of(a, 0) - half_of(b, 0), half_of(a, 16) - half_of(b, 16));
}
HWY_INLINE VI add_pair_products(VI sum, VI a, VI b) {
  const int32_t products = half_of(a, 0) * half_of(b, 0) + half_of(a, 16) * half_of(b, 16);
  return hn::Add(sum, hn::Set(I32(), products));
}

#else

using I16Pairs = hn::Repartition<int16_t, F32>;

template <int kBits>
HWY_INLINE VI shift_pairs_left(VI pairs) {
  return hn::BitCast(I32(), hn::ShiftLeft<kBits>(hn::BitCast(I16Pairs(), pairs)));
}
template <int kBits>
HWY_INLINE VI shift_pairs_right(VI pairs) {  // with the sign
  return hn::BitCast(I32(), hn::ShiftRight<kBits>(hn::BitCast(I16Pairs(), pairs)));
}
HWY_INLINE VI subtract_pairs(VI a, VI b) {
  return hn::BitCast(I32(), hn::Sub(hn::BitCast(I16Pairs(), a), hn::BitCast(I16Pairs(), b)));
}

#if HWY_TARGET == HWY_AVX2

// One piece, because GCC 12 otherwise multiplies for all tokens before it adds, and spills: on a Zen 3 six tokens at
// once take 0.87 (int8) and 0.79 (int4) of the time.
HWY_INLINE VI add_pair_products(VI sum, VI a, VI b) {
  VI products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.raw), "=&x"(products.raw) : "x"(a.raw), "x"(b.raw));
  return sum;
}

#else

HWY_INLINE VI add_pair_products(VI sum, VI a, VI b) {
  const I32 i;
  VI rest = hn::Zero(i);
  const I16Pairs pairs;
  const VI products = hn::ReorderWidenMulAccumulate(i, hn::BitCast(pairs, a), hn::BitCast(pairs, b), hn::Zero(i), rest);
  return hn::Add(sum, hn::RearrangeToOddPlusEven(products, rest));
}

#endif
#endif

// Bytes of 32-bit lanes.
HWY_INLINE hn::Vec<U32> subtract_bytes(hn::Vec<U32> a, hn::Vec<U32> b) {
#if HWY_TARGET == HWY_SCALAR
  const uint32_t x = hn::GetLane(a), y = hn::GetLane(b), top = 0x80808080u;
  return hn::Set(U32(), ((x | top) - (y & ~top)) ^ ((x ^ ~y) & top));
#else
  const hn::Repartition<uint8_t, F32> bytes;
  return hn::BitCast(U32(), hn::Sub(hn::BitCast(bytes, a), hn::BitCast(bytes, b)));
#endif
}

// What fits 16 bits, as a pair of itself.
HWY_INLINE VI both_halves(VI x) {
  return hn::Or(hn::ShiftLeft<16>(x), hn::And(x, hn::Set(I32(), 0xFFFF)));
}

// Highway 1.0.3 has no target for AVX512-VNNI, which adds products of pairs, or of four bytes, in one instruction.
#undef XGDN_VNNI
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
#define XGDN_VNNI
HWY_INLINE VI dot_pairs_at(VI sum, VI a, const int16_t* pair) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "m"(*reinterpret_cast<const int16_t(*)[2]>(pair)));
  return sum;
}
// a without a sign, the other with one
HWY_INLINE VI dot_bytes_at(VI sum, VI a, const int8_t* bytes) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "m"(*reinterpret_cast<const int8_t(*)[4]>(bytes)));
  return sum;
}
#endif

// Whether this machine multiplies tokens of 8 bits as bytes; elsewhere they are i16.
inline bool has_byte_products() {
#ifdef XGDN_VNNI
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// ---- formats --------------------------------------------------------------------------------------------------------

// A row of a panel is kRowBytes long, has kLaneBytes for each output and kDepth of D; it is unpacked in kSteps, each of
// kStepDepth of D. For more than kFewTokens it pays to unpack once for all of them: that is measured on a Zen 3, where
// memory keeps up with six tokens at once only while they are multiplied.

// What integer codes have in common. A token is integers behind a scale for each group, of which a lane takes four
// bytes at once. Codes without zeros beside them have kZero; those of zeros are kOffset more.
template <class Integer, int32_t kZeroOfCodes, int32_t kOffset = 0>
struct IntegerCodes {
  using Token = Integer;
  using Element = int32_t;
  static constexpr size_t kRowBytes = 64;
  static constexpr size_t kLaneBytes = 4;
  static constexpr size_t kStepDepth = 4 / sizeof(Token);
  static constexpr int64_t kFewTokens = 12;
  static constexpr bool kIsExact = true;  // a group's sum
  static constexpr int32_t kZero = kZeroOfCodes;

  static HWY_INLINE VI load(const uint8_t* p) { return hn::LoadU(I32(), reinterpret_cast<const int32_t*>(p)); }

  static HWY_INLINE VI broadcast(const Token* x) {
    int32_t integers;
    std::memcpy(&integers, x, sizeof(integers));
    return hn::Set(I32(), integers);
  }

  static HWY_INLINE VF widen(VI sum) { return hn::ConvertTo(F32(), sum); }

  static HWY_INLINE VF token_scale(const float* scales, size_t at) { return hn::Set(F32(), scales[at]); }

  static HWY_INLINE VI load_zeros(const int8_t* zeros, size_t at) {
    const auto loaded = hn::LoadU(hn::Rebind<int8_t, I32>(), zeros + at);
    return hn::Add(hn::PromoteTo(I32(), loaded), hn::Set(I32(), kOffset));
  }

  // -zero * sum of the token's integers
  static HWY_INLINE VI start(const int8_t* zeros, size_t at, const int32_t* starts, size_t group) {
    const VI of_token = hn::Set(I32(), starts[group]);
    return zeros == nullptr ? of_token : hn::Mul(load_zeros(zeros, at), of_token);
  }
};

// Tokens of i16, multiplied in pairs.
template <bool kHasVnni, int32_t kZero>
struct PairCodes : IntegerCodes<int16_t, kZero> {
  using Base = IntegerCodes<int16_t, kZero>;

  static HWY_INLINE VI add(VI sum, VI weights, VI x) { return add_pair_products(sum, weights, x); }
  static HWY_INLINE VI add_at(VI sum, VI weights, const int16_t* x) {
#ifdef XGDN_VNNI
    if constexpr (kHasVnni) return dot_pairs_at(sum, weights, x);
#endif
    return add(sum, weights, Base::broadcast(x));
  }

  static HWY_INLINE VI zeros(const int8_t* zeros, size_t at) {
    return both_halves(zeros == nullptr ? hn::Set(I32(), kZero) : Base::load_zeros(zeros, at));
  }
  static HWY_INLINE VI subtract(VI pairs, VI zeros) {
    return subtract_pairs(pairs, zeros);
  }
};

template <bool kHasVnni>
struct Int8Pairs : PairCodes<kHasVnni, 0> {
  static constexpr size_t kDepth = 4;
  static constexpr size_t kSteps = 2;

  template <size_t kStep>
  static HWY_INLINE VI unpack(VI codes) {
    if constexpr (kStep == 0) codes = shift_pairs_left<8>(codes);
    return shift_pairs_right<8>(codes);
  }
};

template <bool kHasVnni>
struct Int4Pairs : PairCodes<kHasVnni, 8> {
  static constexpr size_t kDepth = 8;
  static constexpr size_t kSteps = 4;

  template <size_t kStep>
  static HWY_INLINE VI unpack(VI codes) {
    const U32 u;
    const auto shifted = hn::ShiftRight<4 * kStep>(hn::BitCast(u, codes));  // what crosses the halves is cut off
    return hn::BitCast(I32(), hn::And(shifted, hn::Set(u, 0x000F000F)));
  }
};

#ifdef XGDN_VNNI

// Tokens of i8. Codes are multiplied as bytes without a sign.
struct Int8Bytes : IntegerCodes<int8_t, 128, 128> {
  static constexpr size_t kDepth = 4;
  static constexpr size_t kSteps = 1;

  template <size_t kStep>
  static HWY_INLINE VI unpack(VI codes) {
    return hn::Xor(codes, hn::Set(I32(), static_cast<int32_t>(0x80808080)));
  }
  static HWY_INLINE VI add_at(VI sum, VI weights, const int8_t* x) { return dot_bytes_at(sum, weights, x); }
};

struct Int4Bytes : IntegerCodes<int8_t, 8> {
  static constexpr size_t kDepth = 8;
  static constexpr size_t kSteps = 2;

  template <size_t kStep>
  static HWY_INLINE VI unpack(VI codes) {
    return hn::And(hn::ShiftRight<4 * kStep>(codes), hn::Set(I32(), 0x0F0F0F0F));
  }
  static HWY_INLINE VI add_at(VI sum, VI weights, const int8_t* x) { return dot_bytes_at(sum, weights, x); }
};

#endif

// e4m3: four bits of exponent with a bias of 7, no infinities. A token is f32. As f16 the bits are a number 2^8 times
// smaller, subnormal ones too.
struct Float8Codes {
  using Token = float;
  using Element = float;
  static constexpr size_t kRowBytes = 32;
  static constexpr size_t kLaneBytes = 2;
  static constexpr size_t kDepth = 2;
  static constexpr size_t kSteps = 2;
  static constexpr size_t kStepDepth = 1;
  static constexpr int64_t kFewTokens = 6;
  static constexpr bool kIsExact = false;
  static constexpr int32_t kZero = 0;

  using Words = hn::Rebind<uint16_t, F32>;

  static HWY_INLINE hn::Vec<Words> load(const uint8_t* p) {
    return hn::LoadU(Words(), reinterpret_cast<const uint16_t*>(p));
  }

  static HWY_INLINE VF broadcast(const float* x) { return hn::Set(F32(), *x); }

  template <size_t kStep>
  static HWY_INLINE VF unpack(hn::Vec<Words> codes) {
    const hn::Rebind<int16_t, F32> i;
    const hn::Rebind<hwy::float16_t, F32> half;
    if constexpr (kStep == 0) codes = hn::ShiftLeft<8>(codes);
    const auto sign_twice = hn::ShiftRight<1>(hn::BitCast(i, codes));
    return hn::PromoteTo(F32(), hn::BitCast(half, hn::And(sign_twice, hn::Set(i, static_cast<int16_t>(0xBF80)))));
  }

  static HWY_INLINE VF add(VF sum, VF weights, VF x) { return hn::MulAdd(weights, x, sum); }
  static HWY_INLINE VF widen(VF sum) { return sum; }
  static HWY_INLINE VF token_scale(const float*, size_t) { return hn::Set(F32(), 256.0f); }

  static HWY_INLINE VF start(const int8_t*, size_t, const int32_t*, size_t) { return hn::Zero(F32()); }
  static HWY_INLINE VF zeros(const int8_t*, size_t) { return hn::Zero(F32()); }
  static HWY_INLINE VF subtract(VF weights, VF) { return weights; }
};

// Calls f(Format()) for tokens of i16, or of f32.
template <bool kHasVnni, class F>
void with_pairs(Codes format, const F& f) {
  switch (format) {
    case Codes::kInt8:
      return f(Int8Pairs<kHasVnni>());
    case Codes::kInt4:
      return f(Int4Pairs<kHasVnni>());
    case Codes::kFloat8:
      return f(Float8Codes());
  }
}

// Calls f(Format()).
template <class F>
void with_format(Codes format, bool has_byte_tokens, const F& f) {
#ifdef XGDN_VNNI
  if (has_byte_tokens) return format == Codes::kInt8 ? f(Int8Bytes()) : f(Int4Bytes());
  if (__builtin_cpu_supports("avx512vnni")) return with_pairs<true>(format, f);
#endif
  (void)has_byte_tokens;
  with_pairs<false>(format, f);
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_QUANTIZED_CODES_INL_H_
