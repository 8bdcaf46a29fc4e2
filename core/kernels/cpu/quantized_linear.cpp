// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias with weights in 8 or 4 bits. Lanes are outputs, a token's elements are broadcast.
//
//            D ->
//        +---------+   panels of     Loop: block of 32 outputs -> up to 6 tokens -> two vectors of outputs -> groups of
//   O    | codes   |   16 outputs,   D -> rows of a panel (2, 4 or 8 of D). Codes come from memory once, for the first
//        +---------+   interleaved   tokens, in the order in which they lie, and are fetched ahead; they are unpacked
//        +---------+                 once for all tokens at once.
//   T    | tokens  |
//        +---------+
//
// Integer codes: a token's group is i16 times a scale of its own (its largest element becomes 32767), so that a group's
// sum of products is exact in i32, whatever the vectors; one f32 multiply-add a group brings the scales in. float8:
// codes are widened exactly, a group's sum is f32 in ascending D. Groups are added in ascending order, then the bias;
// out is rounded once. A token's bits depend neither on other tokens nor, where multiply-adds are fused, on the width
// of the vectors. A token's group with a value that is not finite becomes NaN.
#include "core/kernels/cpu/quantized_linear.h"

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

inline constexpr size_t kBytesAhead = 4096;  // codes on their way while others are read
inline constexpr auto kPanelOutputs = static_cast<size_t>(kQuantizedPanel);
static_assert(kQuantizedLinearBlock == kBlockOutputs);

// ---- tokens ---------------------------------------------------------------------------------------------------------

// A group of a token to i16 with its scale and the sum of its integers.
void quantize_group(const float* HWY_RESTRICT x, size_t count, int16_t* HWY_RESTRICT to, float& scale, int32_t& sum) {
  const F32 d;
  const I32 i;
  const GroupScale group = group_scale(x, count, /*most=*/32767.0f);
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

void prepare_tokens(const QuantizedLinearArgs& args, int64_t begin_token, int64_t end_token) {
  const auto D = static_cast<size_t>(args.D);
  const auto group_size = static_cast<size_t>(args.group_size);
  const auto groups = static_cast<size_t>(num_groups(args));
  float* rows = scratch<QuantizedLinearArgs>(2 * padded(args.D));
  float* ordered = rows + padded(args.D);
  for (int64_t token = begin_token; token < end_token; ++token) {
    float* row = args.format == Codes::kFloat8 ? static_cast<float*>(args.tokens) + token * args.D : ordered;
    load_row(args.x.dtype, args.x.at(token, 0), D, args.order == nullptr ? row : rows);
    if (args.order != nullptr) {
      for (size_t i = 0; i < D; ++i) row[i] = rows[args.order[i]];
    }
    if (args.format == Codes::kFloat8) continue;
    auto* to = static_cast<int16_t*>(args.tokens) + token * args.D;
    for (size_t g = 0; g < groups; ++g) {
      const size_t at = static_cast<size_t>(token) * groups + g;
      quantize_group(row + g * group_size, group_size, to + g * group_size, args.token_scales[at], args.token_sums[at]);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

HWY_INLINE VF load_scales(const InRows& scales, int64_t panel, size_t group, size_t lane) {
  const F32 d;
  const auto* at = static_cast<const char*>(scales.at(panel, static_cast<int64_t>(group))) +
                   lane * static_cast<size_t>(size_of(scales.dtype));
  if (scales.dtype == DType::kFloat32) return load(d, reinterpret_cast<const float*>(at));
  const auto* half = reinterpret_cast<const uint16_t*>(at);
  return scales.dtype == DType::kBFloat16 ? load(d, half) : load_float16(d, half);
}

// One vector of outputs: where its codes and what goes with them begin.
struct Outputs {
  const uint8_t* codes;
  int64_t panel;
  size_t lane;  // of the panel
};

template <class Format>
HWY_INLINE Outputs outputs_at(const QuantizedLinearArgs& args, int64_t output) {
  const size_t panel_bytes = static_cast<size_t>(args.D) / Format::kDepth * Format::kRowBytes;
  const int64_t panel = output / kQuantizedPanel;
  const auto lane = static_cast<size_t>(output % kQuantizedPanel);
  return {args.codes + static_cast<size_t>(panel) * panel_bytes + lane * Format::kLaneBytes, panel, lane};
}

// Sums [kTokens, 2, lanes] of some tokens for two vectors of outputs.
template <class Format, size_t kTokens, bool kIsFirst>
void multiply(const QuantizedLinearArgs& args, const Outputs& first, const Outputs& second, int64_t token,
              float* HWY_RESTRICT sums) {
  using Token = typename Format::Token;
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const auto D = static_cast<size_t>(args.D);
  const auto groups = static_cast<size_t>(num_groups(args));
  const size_t rows = static_cast<size_t>(args.group_size) / Format::kDepth;
  const Token* HWY_RESTRICT x = static_cast<const Token*>(args.tokens) + token * args.D;
  const uint8_t* HWY_RESTRICT p = first.codes;
  const uint8_t* HWY_RESTRICT q = second.codes;
  for (size_t i = 0; i < 2 * kTokens; ++i) hn::Store(hn::Zero(d), d, sums + i * lanes);

  for (size_t g = 0; g < groups; ++g) {
    const auto start = [&](const Outputs& outputs, size_t t)
                           HWY_ATTR { return Format::start(args, outputs, g, token + static_cast<int64_t>(t)); };
    auto a0 = start(first, 0), b0 = start(second, 0);
    auto a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, b1 = b0, b2 = b0, b3 = b0, b4 = b0, b5 = b0;
    if constexpr (kTokens > 1) a1 = start(first, 1), b1 = start(second, 1);
    if constexpr (kTokens > 2) a2 = start(first, 2), b2 = start(second, 2);
    if constexpr (kTokens > 3) a3 = start(first, 3), b3 = start(second, 3);
    if constexpr (kTokens > 4) a4 = start(first, 4), b4 = start(second, 4);
    if constexpr (kTokens > 5) a5 = start(first, 5), b5 = start(second, 5);
    for (size_t row = 0; row < rows; ++row) {
      if constexpr (kIsFirst) {
        __builtin_prefetch(p + kBytesAhead);
        if (lanes == kPanelOutputs) __builtin_prefetch(q + kBytesAhead);
      }
      const auto some = Format::load(p), others = Format::load(q);
      const auto step = [&]<size_t kStep>() HWY_ATTR {
        const auto w = Format::template unpack<kStep>(some);
        const auto v = Format::template unpack<kStep>(others);
        const auto add = [&](size_t t, auto& a, auto& b) HWY_ATTR {
          const auto xt = Format::broadcast(x + t * D + kStep * Format::kStepDepth);
          a = Format::add(a, w, xt);
          b = Format::add(b, v, xt);
        };
        add(0, a0, b0);
        if constexpr (kTokens > 1) add(1, a1, b1);
        if constexpr (kTokens > 2) add(2, a2, b2);
        if constexpr (kTokens > 3) add(3, a3, b3);
        if constexpr (kTokens > 4) add(4, a4, b4);
        if constexpr (kTokens > 5) add(5, a5, b5);
      };
      step.template operator()<0>();
      step.template operator()<1>();
      if constexpr (Format::kSteps > 2) step.template operator()<2>();
      if constexpr (Format::kSteps > 2) step.template operator()<3>();
      p += Format::kRowBytes;
      q += Format::kRowBytes;
      x += Format::kDepth;
    }
    const VF scale_a = load_scales(args.scales, first.panel, g, first.lane);
    const VF scale_b = load_scales(args.scales, second.panel, g, second.lane);
    const auto fold = [&](size_t t, const auto& a, const auto& b) HWY_ATTR {
      const VF factor = Format::token_scale(args, token + static_cast<int64_t>(t), g);
      float* sum = sums + 2 * t * lanes;
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

// A block, whose panels are whole.
template <class Format, size_t kTokens, bool kIsFirst>
void multiply_block(const QuantizedLinearArgs& args, const OutputBlock& block) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const size_t outputs = (block.rows + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs;
  HWY_ALIGN float sums[2 * kTokens * kMaxLanes];
  for (size_t i = 0; i < outputs; i += 2 * lanes) {
    // Where a block's last panel has no neighbour, it is its own.
    const size_t next = i + lanes < outputs ? i + lanes : i;
    multiply<Format, kTokens, kIsFirst>(args, outputs_at<Format>(args, block.output + static_cast<int64_t>(i)),
                                        outputs_at<Format>(args, block.output + static_cast<int64_t>(next)),
                                        block.token, sums);
    for (size_t t = 0; t < kTokens; ++t) {
      hn::Store(hn::Load(d, sums + 2 * t * lanes), d, block.sums + t * kBlockOutputs + i);
      hn::Store(hn::Load(d, sums + (2 * t + 1) * lanes), d, block.sums + t * kBlockOutputs + next);
    }
  }
}

template <class Format>
void multiply_items(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item) {
  multiply_blocks(args, begin_item, end_item, [&]<size_t kTokens>(const OutputBlock& block) {
    if (block.token == 0) {
      multiply_block<Format, kTokens, true>(args, block);
    } else {
      multiply_block<Format, kTokens, false>(args, block);
    }
  });
}

void quantized_linear(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item) {
  with_format(args.format, [&](auto format) { multiply_items<decltype(format)>(args, begin_item, end_item); });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(prepare_tokens);
HWY_EXPORT(quantized_linear);

void prepare_tokens(const QuantizedLinearArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(prepare_tokens)(args, begin_token, end_token);
}

void quantized_linear(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item) {
  HWY_DYNAMIC_DISPATCH(quantized_linear)(args, begin_item, end_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
