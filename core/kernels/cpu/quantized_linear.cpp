// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias with weights in 8 or 4 bits. Lanes are outputs, a token's elements are broadcast.
//
//            D ->
//        +---------+   panels of     Few tokens: block of 32 outputs -> up to 6 tokens -> two vectors of outputs ->
//   O    | codes   |   16 outputs,   groups of D -> rows of a panel (2, 4 or 8 of D). Codes are unpacked where they are
//        +---------+   interleaved   multiplied, in the order in which they lie, and fetched ahead.
//        +---------+                 Many: block -> up to 96 tokens -> two vectors of outputs -> some groups of D,
//   T    | tokens  |                 unpacked without their zeros, 16 KiB that stay in L1 -> 6 tokens -> groups.
//
// Integer codes where a panel is one of 32 vectors, any number of tokens: block -> up to 96 tokens -> panel -> up to 12
// tokens, whose sums stay in registers -> groups -> rows.
//
// On tiles (integer_tiles.h), which multiply integer codes on machines that have them: tokens whose bytes stay in the
// second-level cache -> block -> panel -> up to 1,024 of D, of int4 as bytes -> 16 rows of tokens -> groups.
//
// Integer codes: a token's group is integers of 16 or 8 bits times a scale of its own (its largest element becomes
// 32639 or 127), so that a group's sum of products is exact in i32, whatever the instructions; one f32 multiply-add a
// group brings the scales in. float8: codes are widened exactly, a group's sum is f32 in ascending D. Groups are added
// in ascending order, then the bias; out is rounded once. A token's bits depend neither on other tokens nor, where
// multiply-adds are fused, on the width of the vectors. A token's group with a value that is not finite becomes NaN.
#include "core/kernels/cpu/quantized_linear.h"

#include <utility>
#include <vector>

#include "core/kernels/cpu/integer_tiles.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/quantized_linear.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/group_scale-inl.h"
#include "core/kernels/cpu/output_blocks-inl.h"
#include "core/kernels/cpu/quantized_codes-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kBytesAhead = 3072;  // codes on their way while others are read
inline constexpr size_t kUnpacked = 4096;    // elements of weights at once: 16 KiB
inline constexpr size_t kManyTokens = 96;    // for which a weight is unpacked once
// Some 24 lines can be on their way to the first level when a program asks for them, more to the second one.
inline constexpr size_t kPanelBytesAhead = 8192;
inline constexpr int kToSecondLevel = 2;
inline constexpr size_t kNextBytes = 4096;  // of the codes that a thread takes next
inline constexpr size_t kPanelTokens = 12;  // at once: two of 32 registers each
inline constexpr auto kPanelOutputs = static_cast<size_t>(kQuantizedPanel);
static_assert(kQuantizedLinearBlock == kBlockOutputs);

// Tiles go with AVX-512, whose multiply-adds they scale with: those of fewer instructions may not be fused.
bool takes_tiles(Codes format, int64_t tokens) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return format != Codes::kFloat8 && tokens > kQuantizedFewTokens && has_byte_products() && integer_tiles() != nullptr;
#else
  (void)format, (void)tokens;
  return false;
#endif
}

// Whether a panel is one vector, and there are registers for its tokens.
template <class Format>
constexpr bool takes_panels() {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return Format::kIsExact;
#else
  return false;
#endif
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

inline constexpr int32_t kMostOfByte = 127;

bool has_byte_tokens(const QuantizedLinearArgs& args) {
  return args.activation_bits == 8 && args.format != Codes::kFloat8 && has_byte_products();
}

// What zero the sum of a token's integers is multiplied by.
int32_t zero_of(const QuantizedLinearArgs& args) {
  int32_t zero = 1;  // the weight has zeros
  if (args.zeros == nullptr) {
    with_format(args.format, has_byte_tokens(args), [&](auto format) { zero = decltype(format)::kZero; });
  }
  return zero;
}

// A group of a token to integers up to `most` with its scale and the sum of its integers.
void quantize_group(const float* HWY_RESTRICT x, size_t count, int32_t most, int16_t* HWY_RESTRICT to, float& scale,
                    int32_t& sum) {
  const F32 d;
  const I32 i;
  const GroupScale group = group_scale(x, count, static_cast<float>(most));
  scale = group.scale;
  if (group.inverse == 0) {
    std::fill_n(to, count, int16_t{0});
    sum = 0;
    return;
  }
  const VF inverse = hn::Set(d, group.inverse);
  auto total = hn::Zero(i);
  for (size_t j = 0; j < count; j += hn::Lanes(d)) {
    const auto whole = hn::NearestInt(hn::Mul(hn::LoadU(d, x + j), inverse));
    hn::StoreU(hn::DemoteTo(hn::Rebind<int16_t, F32>(), whole), hn::Rebind<int16_t, F32>(), to + j);
    total = hn::Add(total, whole);
  }
  sum = hn::GetLane(hn::SumOfLanes(i, total));
}

// Brings count integers, a multiple of 32, as bytes into the order of the codes.
void store_bytes(const int16_t* HWY_RESTRICT x, size_t count, Codes format, int8_t* HWY_RESTRICT to) {
#ifdef XGDN_VNNI
  static constexpr int8_t kInt8Order[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  static constexpr int8_t kInt4Order[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
  const hn::Repartition<int8_t, F32> all;
  const hn::Rebind<int16_t, hn::Half<decltype(all)>> words;
  const auto order = hn::LoadDup128(all, format == Codes::kInt8 ? kInt8Order : kInt4Order);
  for (size_t i = 0; i < count; i += hn::Lanes(words)) {
    const auto bytes = hn::DemoteTo(hn::Half<decltype(all)>(), hn::LoadU(words, x + i));
    const auto half_order = hn::LowerHalf(order);
    hn::StoreU(hn::TableLookupBytes(bytes, half_order), hn::Half<decltype(all)>(), to + i);
  }
#else
  (void)x, (void)count, (void)format, (void)to;
#endif
}

void prepare_tokens(const QuantizedLinearArgs& args, int64_t begin_token, int64_t end_token) {
  const auto D = static_cast<size_t>(args.D);
  const bool has_bytes = has_byte_tokens(args), is_split = args.by_tiles && !has_bytes;
  const int32_t zero = zero_of(args), most = args.activation_bits == 8 ? kMostOfByte : kMostOfTwoBytes;
  thread_local std::vector<int16_t> whole;  // a token's integers, where bytes are kept
  if (has_bytes || is_split) whole.resize(D);
  const auto group_size = static_cast<size_t>(args.group_size);
  const auto groups = static_cast<size_t>(num_groups(args));
  float* rows = scratch<QuantizedLinearArgs>(2 * padded(args.D));
  float* ordered = rows + padded(args.D);
  for (int64_t token = begin_token; token < end_token; ++token) {
    char* to = static_cast<char*>(args.tokens) + token * token_stride(args);
    float* row = args.format == Codes::kFloat8 ? reinterpret_cast<float*>(to) : ordered;
    load_row(args.x.dtype, args.x.at(token, 0), D, args.order == nullptr ? row : rows);
    if (args.order != nullptr) {
      for (size_t i = 0; i < D; ++i) row[i] = rows[args.order[i]];
    }
    if (args.format == Codes::kFloat8) continue;
    int16_t* integers = has_bytes || is_split ? whole.data() : reinterpret_cast<int16_t*>(to);
    for (size_t g = 0; g < groups; ++g) {
      const size_t at = static_cast<size_t>(token) * groups + g;
      int32_t sum;
      quantize_group(row + g * group_size, group_size, most, integers + g * group_size, args.token_scales[at], sum);
      args.token_starts[at] = -zero * sum;
    }
    auto* bytes = reinterpret_cast<int8_t*>(to);
    if (has_bytes) store_bytes(integers, D, args.format, bytes);
    if (is_split) integer_tiles()->split(integers, D, args.format, bytes, bytes + token_stride(args) / 2);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// One vector of outputs: where its codes begin, and its scales and zeros among all; those of a group follow 16 later.
struct Outputs {
  const uint8_t* codes;
  size_t groups;
};

template <class Format>
HWY_INLINE Outputs outputs_at(const QuantizedLinearArgs& args, int64_t output) {
  const size_t panel_bytes = static_cast<size_t>(args.D) / Format::kDepth * Format::kRowBytes;
  const auto panel = static_cast<size_t>(output / kQuantizedPanel);
  const auto lane = static_cast<size_t>(output % kQuantizedPanel);
  return {args.codes + panel * panel_bytes + lane * Format::kLaneBytes,
          panel * static_cast<size_t>(num_groups(args)) * kPanelOutputs + lane};
}

HWY_INLINE VF load_scales(const InRows& scales, size_t at) {
  const F32 d;
  if (scales.dtype == DType::kFloat32) return load(d, static_cast<const float*>(scales.data) + at);
  const auto* half = static_cast<const uint16_t*>(scales.data) + at;
  return scales.dtype == DType::kBFloat16 ? load(d, half) : load_float16(d, half);
}

// Two vectors of outputs as they lie in memory.
template <class Format>
struct PackedWeights {
  static constexpr bool kIsFetched = true;
  static size_t row_bytes() { return Format::kRowBytes; }

  template <size_t kStep>
  static HWY_INLINE auto load_step(const uint8_t* p) {
    return Format::template unpack<kStep>(Format::load(p));
  }

  HWY_INLINE auto start_first(size_t group, const int32_t* starts, size_t at) const {
    return Format::start(args.zeros, first.groups + group * kPanelOutputs, starts, at);
  }
  HWY_INLINE auto start_second(size_t group, const int32_t* starts, size_t at) const {
    return Format::start(args.zeros, second.groups + group * kPanelOutputs, starts, at);
  }
  HWY_INLINE VF first_scales(size_t group) const {
    return load_scales(args.scales, first.groups + group * kPanelOutputs);
  }
  HWY_INLINE VF second_scales(size_t group) const {
    return load_scales(args.scales, second.groups + group * kPanelOutputs);
  }

  const QuantizedLinearArgs& args;
  Outputs first;
  Outputs second;
  const uint8_t* first_codes = first.codes;
  const uint8_t* second_codes = second.codes;
};

// Some groups of two vectors of outputs, without zeros: [rows, steps, 2, lanes].
template <class Format>
struct UnpackedWeights {
  using Element = typename Format::Element;
  static constexpr bool kIsFetched = false;
  static size_t vector_bytes() { return hn::Lanes(F32()) * sizeof(Element); }
  static size_t row_bytes() { return Format::kSteps * 2 * vector_bytes(); }

  template <size_t kStep>
  static HWY_INLINE auto load_step(const uint8_t* p) {
    return hn::Load(hn::Rebind<Element, F32>(), reinterpret_cast<const Element*>(p + kStep * 2 * vector_bytes()));
  }

  HWY_INLINE auto start_first(size_t, const int32_t*, size_t) const { return hn::Zero(hn::Rebind<Element, F32>()); }
  HWY_INLINE auto start_second(size_t, const int32_t*, size_t) const { return hn::Zero(hn::Rebind<Element, F32>()); }
  HWY_INLINE VF first_scales(size_t group) const { return hn::Load(F32(), scales + 2 * group * hn::Lanes(F32())); }
  HWY_INLINE VF second_scales(size_t group) const {
    return hn::Load(F32(), scales + (2 * group + 1) * hn::Lanes(F32()));
  }
  const float* scales;
  const uint8_t* first_codes;
  const uint8_t* second_codes = first_codes + vector_bytes();
};

// Some tokens from a group on.
template <class Format>
struct Tokens {
  using Token = typename Format::Token;

  Tokens(const QuantizedLinearArgs& args, int64_t token, size_t group)
      : stride(static_cast<size_t>(token_stride(args)) / sizeof(Token)), groups(static_cast<size_t>(num_groups(args))) {
    x = static_cast<const Token*>(args.tokens) + static_cast<size_t>(token) * stride +
        group * static_cast<size_t>(args.group_size);
    const size_t at = static_cast<size_t>(token) * groups + group;
    if (args.token_scales != nullptr) scales = args.token_scales + at, starts = args.token_starts + at;
  }

  size_t stride;  // from token to token
  size_t groups;
  const Token* x;
  const float* scales = nullptr;
  const int32_t* starts = nullptr;
};

// Calls f.operator()<step>() for kCount steps.
template <size_t kCount, class F>
HWY_INLINE void for_each_step(const F& f) {
  [&]<size_t... kStep>(std::index_sequence<kStep...>) HWY_ATTR {
    (f.template operator()<kStep>(), ...);
  }
  (std::make_index_sequence<kCount>());
}

// Adds some groups to sums [kTokens, kBlockOutputs].
template <class Format, size_t kTokens, class Weights>
void multiply(const Weights& weights, const Tokens<Format>& tokens, size_t num_groups, size_t rows,
              float* HWY_RESTRICT sums) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const size_t stride = tokens.stride, groups = tokens.groups;
  const auto* HWY_RESTRICT x = tokens.x;
  const uint8_t* HWY_RESTRICT p = weights.first_codes;
  const uint8_t* HWY_RESTRICT q = weights.second_codes;

  for (size_t g = 0; g < num_groups; ++g) {
    const auto first = [&](size_t t) HWY_ATTR { return weights.start_first(g, tokens.starts, t * groups + g); };
    const auto second = [&](size_t t) HWY_ATTR { return weights.start_second(g, tokens.starts, t * groups + g); };
    auto a0 = first(0), b0 = second(0);
    auto a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, b1 = b0, b2 = b0, b3 = b0, b4 = b0, b5 = b0;
    if constexpr (kTokens > 1) a1 = first(1), b1 = second(1);
    if constexpr (kTokens > 2) a2 = first(2), b2 = second(2);
    if constexpr (kTokens > 3) a3 = first(3), b3 = second(3);
    if constexpr (kTokens > 4) a4 = first(4), b4 = second(4);
    if constexpr (kTokens > 5) a5 = first(5), b5 = second(5);
    for (size_t row = 0; row < rows; ++row) {
      if constexpr (Weights::kIsFetched) {
        __builtin_prefetch(p + kBytesAhead);
        if (lanes == kPanelOutputs) __builtin_prefetch(q + kBytesAhead);
      }
      for_each_step<Format::kSteps>([&]<size_t kStep>() HWY_ATTR {
        const auto w = Weights::template load_step<kStep>(p);
        const auto v = Weights::template load_step<kStep>(q);
        const auto add = [&](size_t t, auto& a, auto& b) HWY_ATTR {
          const auto xt = Format::broadcast(x + t * stride + kStep * Format::kStepDepth);
          a = Format::add(a, w, xt);
          b = Format::add(b, v, xt);
        };
        add(0, a0, b0);
        if constexpr (kTokens > 1) add(1, a1, b1);
        if constexpr (kTokens > 2) add(2, a2, b2);
        if constexpr (kTokens > 3) add(3, a3, b3);
        if constexpr (kTokens > 4) add(4, a4, b4);
        if constexpr (kTokens > 5) add(5, a5, b5);
      });
      p += Weights::row_bytes();
      q += Weights::row_bytes();
      x += Format::kDepth;
    }
    const VF scale_a = weights.first_scales(g), scale_b = weights.second_scales(g);
    const auto fold = [&](size_t t, const auto& a, const auto& b) HWY_ATTR {
      const VF factor = Format::token_scale(tokens.scales, t * groups + g);
      float* sum = sums + t * kBlockOutputs;
      hn::Store(hn::MulAdd(Format::widen(a), hn::Mul(scale_a, factor), hn::Load(d, sum)), d, sum);
      hn::Store(hn::MulAdd(Format::widen(b), hn::Mul(scale_b, factor), hn::Load(d, sum + lanes)), d, sum + lanes);
    };
    fold(0, a0, b0);
    if constexpr (kTokens > 1) fold(1, a1, b1);
    if constexpr (kTokens > 2) fold(2, a2, b2);
    if constexpr (kTokens > 3) fold(3, a3, b3);
    if constexpr (kTokens > 4) fold(4, a4, b4);
    if constexpr (kTokens > 5) fold(5, a5, b5);
  }
}

// Calls f(first, second, sums) for the outputs of a block, two vectors at a time, with sums at zero. Panels are whole;
// where a block's last one has no neighbour, it is its own.
template <class Format, class F>
HWY_INLINE void for_vectors(const QuantizedLinearArgs& args, const OutputBlock& block, const F& f) {
  const size_t lanes = hn::Lanes(F32());
  const size_t outputs = (block.rows + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs;
  for (size_t i = 0; i < outputs; i += 2 * lanes) {
    const size_t next = i + lanes < outputs ? i + lanes : i;
    f(outputs_at<Format>(args, block.output + static_cast<int64_t>(i)),
      outputs_at<Format>(args, block.output + static_cast<int64_t>(next)), block.sums + i);
  }
}

// Tokens on a panel that is one vector: codes are read in the order of memory, which processors see and read ahead of
// by themselves. What they see is the longer, the fewer instructions there are: few tokens take four rows at once, and
// have two sums each, which shortens the chain of additions, as integers allow.
template <class Format, size_t kTokens>
void multiply_panel(const PackedWeights<Format>& weights, const Tokens<Format>& tokens, size_t rows,
                    float* HWY_RESTRICT sums) {
  const F32 d;
  constexpr size_t kChains = kTokens <= 2 ? 2 : 1;
  constexpr size_t kRows = kTokens <= 2 ? 4 : 1;  // at once; a group has a multiple
  const size_t stride = tokens.stride, groups = tokens.groups;
  const uint8_t* HWY_RESTRICT p = weights.first_codes;
  const auto* HWY_RESTRICT x = tokens.x;
  VF totals[kTokens];
  VI of_group[kTokens * kChains];
#pragma GCC unroll 16
  for (size_t t = 0; t < kTokens; ++t) totals[t] = hn::Zero(d);
  for (size_t g = 0; g < groups; ++g) {
#pragma GCC unroll 16
    for (size_t t = 0; t < kTokens; ++t) {
      of_group[kChains * t] = weights.start_first(g, tokens.starts, t * groups + g);
      if constexpr (kChains == 2) of_group[kChains * t + 1] = hn::Zero(I32());
    }
    for (size_t row = 0; row < rows; row += kRows) {
      if constexpr (kTokens > 1) {
#pragma GCC unroll 4
        for (size_t i = 0; i < kRows; ++i) {
          __builtin_prefetch(p + kPanelBytesAhead + i * Format::kRowBytes, /*rw=*/0, kToSecondLevel);
        }
      }
      for_each_step<kRows * Format::kSteps>([&]<size_t kStep>() HWY_ATTR {
        constexpr size_t kRow = kStep / Format::kSteps;
        const auto w = PackedWeights<Format>::template load_step<kStep % Format::kSteps>(p + kRow * Format::kRowBytes);
#pragma GCC unroll 16
        for (size_t t = 0; t < kTokens; ++t) {
          VI& sum = of_group[kChains * t + kStep % kChains];
          sum = Format::add_at(sum, w, x + t * stride + kStep * Format::kStepDepth);
        }
      });
      p += kRows * Format::kRowBytes;
      x += kRows * Format::kDepth;
    }
    const VF scales = weights.first_scales(g);
#pragma GCC unroll 16
    for (size_t t = 0; t < kTokens; ++t) {
      VI sum = of_group[kChains * t];
      if constexpr (kChains == 2) sum = hn::Add(sum, of_group[kChains * t + 1]);
      const VF factor = Format::token_scale(tokens.scales, t * groups + g);
      totals[t] = hn::MulAdd(Format::widen(sum), hn::Mul(scales, factor), totals[t]);
    }
  }
#pragma GCC unroll 16
  for (size_t t = 0; t < kTokens; ++t) hn::Store(totals[t], d, sums + t * kBlockOutputs);
}

// Panels of a block, one after the other, each by all of the tokens.
template <class Format>
void multiply_block_by_panels(const QuantizedLinearArgs& args, const OutputBlock& block, int64_t num_tokens) {
  const size_t rows = static_cast<size_t>(args.group_size) / Format::kDepth;
  for (size_t i = 0; i < block.rows; i += kPanelOutputs) {
    const Outputs panel = outputs_at<Format>(args, block.output + static_cast<int64_t>(i));
    for_even_parts(num_tokens, kPanelTokens, [&](int64_t token, int64_t count) {
      const Tokens<Format> tokens(args, block.token + token, 0);
      with_count<kPanelTokens>(count, [&]<size_t kTokens>() {
        multiply_panel<Format, kTokens>({args, panel, panel}, tokens, rows,
                                        block.sums + static_cast<size_t>(token) * kBlockOutputs + i);
      });
    });
  }
}

// A few tokens: codes are unpacked where they are multiplied.
template <class Format, size_t kTokens>
void multiply_block(const QuantizedLinearArgs& args, const OutputBlock& block) {
  const size_t rows = static_cast<size_t>(args.group_size) / Format::kDepth;
  const Tokens<Format> tokens(args, block.token, 0);
  std::fill_n(block.sums, kTokens * kBlockOutputs, 0.0f);
  for_vectors<Format>(args, block, [&](const Outputs& first, const Outputs& second, float* sums) {
    multiply<Format, kTokens>(PackedWeights<Format>{args, first, second}, tokens, tokens.groups, rows, sums);
  });
}

// Unpacks some groups of two vectors of outputs, and their scales to f32.
template <class Format>
void unpack_groups(const QuantizedLinearArgs& args, const Outputs& first, const Outputs& second, size_t begin_group,
                   size_t end_group, typename Format::Element* HWY_RESTRICT to, float* HWY_RESTRICT scales) {
  const F32 d;
  const hn::Rebind<typename Format::Element, F32> e;
  const size_t lanes = hn::Lanes(d);
  const size_t rows = static_cast<size_t>(args.group_size) / Format::kDepth;
  const uint8_t* HWY_RESTRICT p = first.codes + begin_group * rows * Format::kRowBytes;
  const uint8_t* HWY_RESTRICT q = second.codes + begin_group * rows * Format::kRowBytes;
  for (size_t g = begin_group; g < end_group; ++g) {
    const size_t first_at = first.groups + g * kPanelOutputs, second_at = second.groups + g * kPanelOutputs;
    const auto first_zeros = Format::zeros(args.zeros, first_at), second_zeros = Format::zeros(args.zeros, second_at);
    hn::Store(load_scales(args.scales, first_at), d, scales);
    hn::Store(load_scales(args.scales, second_at), d, scales + lanes);
    scales += 2 * lanes;
    for (size_t row = 0; row < rows; ++row) {
      __builtin_prefetch(p + kBytesAhead);
      if (lanes == kPanelOutputs) __builtin_prefetch(q + kBytesAhead);
      for_each_step<Format::kSteps>([&]<size_t kStep>() HWY_ATTR {
        hn::Store(Format::subtract(PackedWeights<Format>::template load_step<kStep>(p), first_zeros), e, to);
        hn::Store(Format::subtract(PackedWeights<Format>::template load_step<kStep>(q), second_zeros), e, to + lanes);
        to += 2 * lanes;
      });
      p += Format::kRowBytes;
      q += Format::kRowBytes;
    }
  }
}

// Many tokens: some groups are unpacked once for all of them.
template <class Format>
void multiply_block_of_many(const QuantizedLinearArgs& args, const OutputBlock& block, int64_t num_tokens) {
  using Element = typename Format::Element;
  static_assert(sizeof(Element) == 4 && kUnpacked >= 128 * kBlockOutputs);
  const size_t group_elements = static_cast<size_t>(args.group_size) / Format::kStepDepth * 2 * hn::Lanes(F32());
  const size_t groups = static_cast<size_t>(num_groups(args)), groups_at_once = kUnpacked / group_elements;
  const size_t rows = static_cast<size_t>(args.group_size) / Format::kDepth;
  HWY_ALIGN Element weights[kUnpacked];
  HWY_ALIGN float scales[kUnpacked / 16];  // a group has 16 steps or more
  std::fill_n(block.sums, static_cast<size_t>(num_tokens) * kBlockOutputs, 0.0f);
  for_vectors<Format>(args, block, [&](const Outputs& first, const Outputs& second, float* sums) HWY_ATTR {
    for (size_t begin = 0; begin < groups; begin += groups_at_once) {
      const size_t end = std::min(groups, begin + groups_at_once);
      unpack_groups<Format>(args, first, second, begin, end, weights, scales);
      const UnpackedWeights<Format> unpacked = {scales, reinterpret_cast<const uint8_t*>(weights)};
      for_even_parts(num_tokens, kTokensAtOnce, [&](int64_t token, int64_t count) HWY_ATTR {
        const Tokens<Format> tokens(args, block.token + token, begin);
        with_count<kTokensAtOnce>(count, [&]<size_t kTokens>() {
          multiply<Format, kTokens>(unpacked, tokens, end - begin, rows,
                                    sums + static_cast<size_t>(token) * kBlockOutputs);
        });
      });
    }
  });
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

inline constexpr size_t kTileDepth = 1024;         // of D at once: a panel's codes are 16 KiB
inline constexpr int64_t kTokenBytes = 512 << 10;  // of tokens that pass over blocks of outputs together

// Some of D of a panel of outputs.
struct TilePanel {
  const uint8_t* codes;
  size_t bytes_ahead;
  const int8_t* zeros;
  HWY_ALIGN float scales[kTileDepth / 32 * kPanelOutputs];
  HWY_ALIGN uint8_t bytes[kTileDepth * kPanelOutputs];
};

// int4 codes of some groups as signed bytes, less the zero that they have without zeros of their own.
void unpack_bytes(const uint8_t* HWY_RESTRICT codes, size_t num_rows, uint32_t zero_of_four, uint8_t* HWY_RESTRICT to) {
  const U32 u;
  const auto nibbles = hn::Set(u, 0x0F0F0F0F), zero = hn::Set(u, zero_of_four);
  const auto* from = reinterpret_cast<const uint32_t*>(codes);
  auto* both = reinterpret_cast<uint32_t*>(to);
  for (size_t row = 0; row < num_rows; ++row, from += kPanelOutputs, both += 2 * kPanelOutputs) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kBytesAhead);
    for (size_t i = 0; i < kPanelOutputs; i += hn::Lanes(u)) {
      const auto packed = hn::LoadU(u, from + i);
      hn::Store(subtract_bytes(hn::And(packed, nibbles), zero), u, both + i);
      hn::Store(subtract_bytes(hn::And(hn::ShiftRight<4>(packed), nibbles), zero), u, both + kPanelOutputs + i);
    }
  }
}

// Groups from `group` on of a panel that begins with `output`.
template <class Format>
void load_panel(const QuantizedLinearArgs& args, int64_t output, size_t group, size_t num_groups, TilePanel& panel) {
  const Outputs first = outputs_at<Format>(args, output);
  const size_t at = first.groups + group * kPanelOutputs;
  panel.codes = first.codes + group * static_cast<size_t>(args.group_size) / Format::kDepth * Format::kRowBytes;
  panel.bytes_ahead = kBytesAhead;
  panel.zeros = args.zeros == nullptr ? nullptr : args.zeros + at;
  for (size_t i = 0; i < num_groups * kPanelOutputs; i += hn::Lanes(F32())) {
    hn::Store(load_scales(args.scales, at + i), F32(), panel.scales + i);
  }
  if (args.format == Codes::kInt4) {
    const size_t rows = num_groups * static_cast<size_t>(args.group_size) / Format::kDepth;
    unpack_bytes(panel.codes, rows, args.zeros == nullptr ? 0x08080808u : 0u, panel.bytes);
    panel.codes = panel.bytes;
    panel.bytes_ahead = 0;
  }
}

template <class Format>
void multiply_block_by_tiles(const QuantizedLinearArgs& args, const IntegerTiles& tiles, const OutputBlock& block,
                             int64_t num_tokens) {
  const auto group_size = static_cast<size_t>(args.group_size);
  const size_t groups = static_cast<size_t>(num_groups(args)), groups_at_once = kTileDepth / group_size;
  const size_t token_rows = has_byte_tokens(args) ? 1 : 2;
  const auto stride = static_cast<size_t>(token_stride(args));
  TilePanel panel;
  size_t set_to = 0;  // tokens of the tiles
  std::fill_n(block.sums, static_cast<size_t>(num_tokens) * kBlockOutputs, 0.0f);
  for (size_t i = 0; i < block.rows; i += kPanelOutputs) {
    for (size_t group = 0; group < groups; group += groups_at_once) {
      const size_t count = std::min(groups_at_once, groups - group);
      load_panel<Format>(args, block.output + static_cast<int64_t>(i), group, count, panel);
      for_even_parts(num_tokens, static_cast<int64_t>(kTileTokenRows / token_rows), [&](int64_t token, int64_t part) {
        const auto at = static_cast<size_t>(block.token + token), T = static_cast<size_t>(part);
        if (T != set_to) tiles.begin(token_rows * T, group_size), set_to = T;
        tiles.multiply({.T = T,
                        .token_rows = token_rows,
                        .num_groups = count,
                        .group_size = group_size,
                        .codes = panel.codes,
                        .scales = panel.scales,
                        .zeros = panel.zeros,
                        .tokens = static_cast<const int8_t*>(args.tokens) + at * stride + group * group_size,
                        .token_stride = stride / token_rows,
                        .token_scales = args.token_scales + at * groups + group,
                        .token_starts = args.token_starts + at * groups + group,
                        .token_group_stride = groups,
                        .sums = block.sums + static_cast<size_t>(token) * kBlockOutputs + i,
                        .sum_stride = kBlockOutputs,
                        .bytes_ahead = token == 0 ? panel.bytes_ahead : 0});
      });
    }
  }
  tiles.end();
}

template <class Format>
void multiply_items_by_tiles(const QuantizedLinearArgs& args, const IntegerTiles& tiles, int64_t begin_item,
                             int64_t end_item) {
  for_even_parts(args.T, std::max<int64_t>(kTokenBytes / token_stride(args), kTileTokenRows),
                 [&](int64_t token, int64_t count) {
                   const QuantizedLinearArgs part = of_tokens(args, token, count);
                   multiply_blocks<kManyTokens>(part, begin_item, end_item, [&](const OutputBlock& block, int64_t T) {
                     multiply_block_by_tiles<Format>(part, tiles, block, T);
                   });
                 });
}

// ---------------------------------------------------------------------------------------------------------------------

template <class Format>
void multiply_items(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item) {
  if constexpr (Format::kIsExact) {
    if (args.by_tiles) return multiply_items_by_tiles<Format>(args, *integer_tiles(), begin_item, end_item);
  }
  if constexpr (takes_panels<Format>()) {
    multiply_blocks<kManyTokens>(args, begin_item, end_item, [&](const OutputBlock& block, int64_t num_tokens) {
      multiply_block_by_panels<Format>(args, block, num_tokens);
    });
  } else if (args.T <= Format::kFewTokens) {
    multiply_blocks<kTokensAtOnce>(args, begin_item, end_item, [&](const OutputBlock& block, int64_t num_tokens) {
      with_count<kTokensAtOnce>(num_tokens, [&]<size_t kTokens>() { multiply_block<Format, kTokens>(args, block); });
    });
  } else {
    multiply_blocks<kManyTokens>(args, begin_item, end_item, [&](const OutputBlock& block, int64_t num_tokens) {
      multiply_block_of_many<Format>(args, block, num_tokens);
    });
  }
}

void quantized_linear(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item) {
  with_format(args.format, has_byte_tokens(args), [&](auto format) {
    using Format = decltype(format);
    if (next_item < num_work_items(args)) {
      const Outputs next = outputs_at<Format>(args, next_item * kQuantizedLinearBlock);
      prefetch</*kIsWritten=*/0, kToSecondLevel>(next.codes, kNextBytes);
    }
    multiply_items<Format>(args, begin_item, end_item);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(takes_tiles);
HWY_EXPORT(prepare_tokens);
HWY_EXPORT(quantized_linear);

bool takes_tiles(Codes format, int64_t tokens) {
  return HWY_DYNAMIC_DISPATCH(takes_tiles)(format, tokens);
}

void prepare_tokens(const QuantizedLinearArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(prepare_tokens)(args, begin_token, end_token);
}

void quantized_linear(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item) {
  HWY_DYNAMIC_DISPATCH(quantized_linear)(args, begin_item, end_item, next_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
