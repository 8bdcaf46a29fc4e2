// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution with SiLU.
//
// Loop: block of channels -> sequence -> token -> channel lanes.
// The maths and its rounding: causal_conv1d-inl.h.
#include "core/kernels/cpu/causal_conv1d.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/causal_conv1d.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/causal_conv1d-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kConvScratch = kConvBlock * (kMaxTaps + 1 + kMaxHistory + kMaxTaps + 1 + 1);

// The slot's rows become entries first, first + 1, ... of [history | inputs].
void write_history(const CausalConv1dArgs& args, ConvBlock& b, int32_t slot, int64_t begin, int64_t first,
                   int64_t count) {
  const int64_t history = args.W - 1;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t entry = first + r;
    const float* values = row(b.history, entry);
    if (entry >= history) {
      load_input(args, b, begin + entry - history, b.out);
      values = b.out;
    }
    store_row(args.conv_state.dtype, values, b.count, state_row(args, b, slot, r));
  }
}

void copy_slot(const CausalConv1dArgs& args, const ConvBlock& b, int32_t from, int32_t to) {
  if (from == to) return;
  for (int64_t r = 0; r < args.R; ++r) {
    std::memcpy(state_row(args, b, to, r), state_row(args, b, from, r), b.count * size_of(args.conv_state.dtype));
  }
}

char* out_channels(const CausalConv1dArgs& args, const ConvBlock& b, int64_t token) {
  return const_cast<char*>(channel(args.out.at(token, 0), args.out.dtype, b.first));
}

// A token's channels lie a row apart from the next one's, on a page of their own.
void prefetch_token(const CausalConv1dArgs& args, const ConvBlock& b, int64_t token) {
  const auto count = static_cast<size_t>(b.count);
  prefetch(channel(args.x.at(token, 0), args.x.dtype, b.first), count * static_cast<size_t>(size_of(args.x.dtype)));
  prefetch</*kIsWritten=*/1>(channel(args.out.at(token, 0), args.out.dtype, b.first),
                             count * static_cast<size_t>(size_of(args.out.dtype)));
}

// What convolve_token computes, of one token or two, which share the loads of the taps. rows[w] is the window's row w;
// the tokens' own rows are written.
template <int kW, int kTokens, class Element>
HWY_INLINE void convolve_tokens(const CausalConv1dArgs& args, const ConvBlock& b, int64_t token, float* const* rows) {
  static_assert(kTokens == 1 || kTokens == 2);
  const F32 d;
  const auto count = static_cast<size_t>(b.count);
  const auto in = [&](int t) {
    return reinterpret_cast<const Element*>(channel(args.x.at(token + t, 0), args.x.dtype, b.first));
  };
  const auto out = [&](int t) { return reinterpret_cast<Element*>(out_channels(args, b, token + t)); };
  const Element *x0 = in(0), *x1 = in(kTokens - 1);
  Element *out0 = out(0), *out1 = out(kTokens - 1);
  for (size_t i = 0; i < count; i += hn::Lanes(d)) {
    const VF in0 = load_part(d, x0 + i, count - i);
    hn::Store(in0, d, rows[kW - 1] + i);
    VF in1 = in0;
    if constexpr (kTokens == 2) {
      in1 = load_part(d, x1 + i, count - i);
      hn::Store(in1, d, rows[kW] + i);
    }
    VF y0 = hn::Load(d, b.bias + i), y1 = y0;
    for (int w = 0; w < kW; ++w) {
      const VF tap = hn::Load(d, row(b.taps, w) + i);
      y0 = hn::MulAdd(tap, w + 1 < kW ? hn::Load(d, rows[w] + i) : in0, y0);
      if constexpr (kTokens == 2) {
        y1 = hn::MulAdd(tap, w + 2 < kW ? hn::Load(d, rows[w + 1] + i) : w + 2 == kW ? in0 : in1, y1);
      }
    }
    store_part(d, args.silu ? silu(d, y0) : y0, out0 + i, count - i);
    if constexpr (kTokens == 2) store_part(d, args.silu ? silu(d, y1) : y1, out1 + i, count - i);
  }
}

// The window's first rows are the inputs before `begin`.
template <int kW, class Element>
void convolve_tokens(const CausalConv1dArgs& args, const ConvBlock& b, int64_t begin, int64_t end) {
  constexpr int64_t kTokensAhead = 4;  // are on their way meanwhile
  float* rows[kW + 1];
  for (int w = 0; w <= kW; ++w) rows[w] = row(b.window, w);
  int64_t token = begin;
  for (; token + 2 <= end; token += 2) {
    const int64_t ahead = token + kTokensAhead;
    for (int64_t t = ahead; t < std::min(ahead + 2, end); ++t) prefetch_token(args, b, t);
    convolve_tokens<kW, 2, Element>(args, b, token, rows);
    std::rotate(rows, rows + 2, rows + kW + 1);
  }
  if (token < end) convolve_tokens<kW, 1, Element>(args, b, token, rows);
}

void convolve_sequence(const CausalConv1dArgs& args, int64_t n, ConvBlock& b) {
  const int64_t begin = args.cu_seqlens[n];
  const int64_t len = args.cu_seqlens[n + 1] - begin;
  const int32_t read_slot = args.conv_state.read[n];
  const int32_t write_slot = args.conv_state.write[n];
  if (read_slot < 0) {
    for (int64_t t = 0; t < len; ++t)
      std::memset(out_channels(args, b, begin + t), 0, b.count * size_of(args.out.dtype));
    return;
  }
  if (args.is_update && len == 0) {
    if (write_slot >= 0) copy_slot(args, b, read_slot, write_slot);
    return;
  }

  const int64_t history = args.W - 1;
  const int64_t first_row = args.num_accepted != nullptr ? args.num_accepted[n] - 1 : 0;
  const bool has_initial_state = args.has_initial_state == nullptr || args.has_initial_state[n];
  if (args.is_update && len == 1) {
    convolve_decode(args, n, begin, first_row, b);
    store_row(args.out.dtype, b.out, b.count, out_channels(args, b, begin));
    return;
  }
  if (has_initial_state) {
    load_history(args, b, read_slot, first_row, b.history);
  } else {
    std::fill_n(b.history, history * kConvBlock, 0.0f);
  }
  std::copy_n(b.history, history * kConvBlock, b.window);
  with_element_type(args.x.dtype, [&](auto element) {
    using Element = decltype(element);
    switch (args.W) {
      case 2:
        return convolve_tokens<2, Element>(args, b, begin, begin + len);
      case 3:
        return convolve_tokens<3, Element>(args, b, begin, begin + len);
      default:
        return convolve_tokens<4, Element>(args, b, begin, begin + len);
    }
  });
  if (write_slot < 0) return;
  if (args.is_update) {
    write_history(args, b, write_slot, begin, /*first=*/1, /*count=*/history - 1 + len);
  } else {
    write_history(args, b, write_slot, begin, /*first=*/len, /*count=*/history);
  }
}

void causal_conv1d(const CausalConv1dArgs& args, int64_t begin, int64_t end) {
  ConvBlock b;
  // Lanes past the last channel are computed and dropped.
  b.taps = zeroed_scratch<ConvBlock>(kConvScratch);
  b.bias = row(b.taps, kMaxTaps);
  b.history = row(b.bias, 1);
  b.window = row(b.history, kMaxHistory);
  b.out = row(b.window, kMaxTaps + 1);
  int64_t loaded = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / args.N;
    const int64_t first = block * kConvBlock;
    if (block != loaded) load_taps(args, first, std::min(kConvBlock, args.D - first), b);
    loaded = block;
    convolve_sequence(args, item % args.N, b);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(causal_conv1d);

void causal_conv1d(const CausalConv1dArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(causal_conv1d)(args, begin, end);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
