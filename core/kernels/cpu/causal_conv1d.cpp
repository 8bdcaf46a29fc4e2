// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution with SiLU.
//
// Loop: block of channels -> sequence -> chunk of tokens -> channel lanes -> token, whose history stays in registers.
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

constexpr int64_t kTokens = 16;      // tokens widened at once: half of a first-level cache
constexpr int64_t kTokensAhead = 4;  // that are on their way while one is computed
constexpr size_t kConvScratch = kConvBlock * (kMaxTaps + 1 + kMaxHistory + kMaxHistory + kTokens + 1);

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

// A token's channels lie a row apart from the next one's, on a page of their own.
void prefetch_token(const CausalConv1dArgs& args, const ConvBlock& b, int64_t token) {
  const auto count = static_cast<size_t>(b.count);
  prefetch(channel(args.x.at(token, 0), args.x.dtype, b.first), count * static_cast<size_t>(size_of(args.x.dtype)));
  prefetch</*kIsWritten=*/1>(channel(args.out.at(token, 0), args.out.dtype, b.first),
                             count * static_cast<size_t>(size_of(args.out.dtype)));
}

// Outputs of `count` tokens, in the places of the window's first rows: what convolve_token computes of each.
template <int kW>
void convolve_tokens(const ConvBlock& b, int64_t count, bool silu) {
  const F32 d;
  for (size_t i = 0; i < padded(b.count); i += hn::Lanes(d)) {
    const auto tap = [&](int w) HWY_ATTR { return hn::Load(d, b.taps + w * kConvBlock + i); };
    float* const column = b.window + i;
    const VF bias = hn::Load(d, b.bias + i);
    const VF tap0 = tap(0), tap1 = tap(1), tap2 = tap(kW > 2 ? 2 : 1), tap3 = tap(kW - 1);
    VF x0 = hn::Load(d, column), x1 = hn::Load(d, row(column, 1)), x2 = hn::Load(d, row(column, 2));
    for (int64_t t = 0; t < count; ++t) {
      const VF x3 = hn::Load(d, row(column, t + kW - 1));
      VF y = hn::MulAdd(tap0, x0, bias);
      if constexpr (kW > 2) y = hn::MulAdd(tap1, x1, y);
      if constexpr (kW > 3) y = hn::MulAdd(tap2, x2, y);
      y = hn::MulAdd(tap3, x3, y);
      hn::Store(silu ? hn::Mul(y, sigmoid(d, y)) : y, d, row(column, t));
      x0 = kW > 2 ? x1 : x3;
      x1 = kW > 3 ? x2 : x3;
      x2 = x3;
    }
  }
}

void convolve_tokens(const CausalConv1dArgs& args, const ConvBlock& b, int64_t count) {
  switch (args.W) {
    case 2:
      return convolve_tokens<2>(b, count, args.silu);
    case 3:
      return convolve_tokens<3>(b, count, args.silu);
    default:
      return convolve_tokens<4>(b, count, args.silu);
  }
}

void convolve_sequence(const CausalConv1dArgs& args, int64_t n, ConvBlock& b) {
  const int64_t begin = args.cu_seqlens[n];
  const int64_t len = args.cu_seqlens[n + 1] - begin;
  const int32_t read_slot = args.conv_state.read[n];
  const int32_t write_slot = args.conv_state.write[n];
  const auto out_channels = [&](int64_t token) {
    return const_cast<char*>(channel(args.out.at(token, 0), args.out.dtype, b.first));
  };
  if (read_slot < 0) {
    for (int64_t t = 0; t < len; ++t) std::memset(out_channels(begin + t), 0, b.count * size_of(args.out.dtype));
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
    store_row(args.out.dtype, b.out, b.count, out_channels(begin));
    return;
  }
  if (has_initial_state) {
    load_history(args, b, read_slot, first_row, b.history);
  } else {
    std::fill_n(b.history, history * kConvBlock, 0.0f);
  }
  std::copy_n(b.history, history * kConvBlock, b.window);
  for (int64_t chunk = 0; chunk < len; chunk += kTokens) {
    const int64_t count = std::min(kTokens, len - chunk);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = begin + chunk + t;
      if (chunk + t + kTokensAhead < len) prefetch_token(args, b, token + kTokensAhead);
      load_input(args, b, token, row(b.window, history + t));
    }
    convolve_tokens(args, b, count);
    for (int64_t t = 0; t < count; ++t) {
      store_row(args.out.dtype, row(b.window, t), b.count, out_channels(begin + chunk + t));
    }
    std::memmove(b.window, row(b.window, count), history * kConvBlock * sizeof(float));
  }
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
  b.out = row(b.window, kMaxHistory + kTokens);
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
