// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution with SiLU.
//
//   y[t, c] = bias[c] + sum_w weight[c, w] in[t + w, c],  in = [history: W-1 rows | x],  out = y sigmoid(y)
//
// Loop: block of channels -> sequence -> chunk of tokens -> token -> channel lanes. The taps of a block are transposed
// to [W, channels] once and serve all sequences of a range.
// Rounding: inputs, taps and history are widened exactly, sums are f32 (bias first, then taps ascending), out is
// rounded once, inputs are rounded to the pool's type when they become history.
#include "core/kernels/cpu/causal_conv1d.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/causal_conv1d.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kTokens = 32;  // tokens widened at once: 32 KiB of a block
constexpr int64_t kMaxHistory = 3;

// One block of channels in f32. Rows are kConvBlock apart.
struct ConvBlock {
  int64_t index = -1;
  int64_t first = 0;  // channel
  int64_t count = 0;
  float* taps;     // [W]
  float* bias;     // [1]
  float* history;  // [W-1]
  float* window;   // [W-1 + kTokens]  history, then inputs
  float* out;      // [1]
};

constexpr size_t kConvScratch = kConvBlock * (4 + 1 + kMaxHistory + kMaxHistory + kTokens + 1);

float* row(float* rows, int64_t i) {
  return rows + i * kConvBlock;
}

const char* channel(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

char* state_row(const CausalConv1dArgs& args, const ConvBlock& b, int32_t slot, int64_t r) {
  return static_cast<char*>(args.conv_state) +
         (slot * args.slot_stride + r * args.D + b.first) * size_of(args.conv_state_dtype);
}

// [channels, W] to [W, channels].
void transpose_taps(const float* HWY_RESTRICT by_channel, int64_t W, ConvBlock& b) {
  const F32 d;
  for (size_t i = 0; i < padded(b.count); i += hn::Lanes(d)) {
    const float* taps = by_channel + i * W;
    VF t0, t1, t2, t3;
    if (W == 2) {
      hn::LoadInterleaved2(d, taps, t0, t1);
    } else if (W == 3) {
      hn::LoadInterleaved3(d, taps, t0, t1, t2);
      hn::Store(t2, d, row(b.taps, 2) + i);
    } else {
      hn::LoadInterleaved4(d, taps, t0, t1, t2, t3);
      hn::Store(t2, d, row(b.taps, 2) + i);
      hn::Store(t3, d, row(b.taps, 3) + i);
    }
    hn::Store(t0, d, row(b.taps, 0) + i);
    hn::Store(t1, d, row(b.taps, 1) + i);
  }
}

void load_block(const CausalConv1dArgs& args, int64_t index, ConvBlock& b) {
  b.index = index;
  b.first = index * kConvBlock;
  b.count = std::min(kConvBlock, args.D - b.first);
  float* by_channel = b.window;
  load_row(args.x.dtype, channel(args.weight, args.x.dtype, b.first * args.W), b.count * args.W, by_channel);
  transpose_taps(by_channel, args.W, b);
  if (args.bias != nullptr) load_row(args.x.dtype, channel(args.bias, args.x.dtype, b.first), b.count, b.bias);
}

template <int kW>
void convolve_token(const ConvBlock& b, const float* HWY_RESTRICT window, bool silu) {
  const F32 d;
  for (size_t i = 0; i < padded(b.count); i += hn::Lanes(d)) {
    VF y = hn::Load(d, b.bias + i);
    for (int w = 0; w < kW; ++w) {
      y = hn::MulAdd(hn::Load(d, b.taps + w * kConvBlock + i), hn::Load(d, window + w * kConvBlock + i), y);
    }
    hn::Store(silu ? hn::Mul(y, sigmoid(d, y)) : y, d, b.out + i);
  }
}

void convolve(const CausalConv1dArgs& args, const ConvBlock& b, const float* window) {
  switch (args.W) {
    case 2:
      return convolve_token<2>(b, window, args.silu);
    case 3:
      return convolve_token<3>(b, window, args.silu);
    default:
      return convolve_token<4>(b, window, args.silu);
  }
}

// The slot's rows become entries first, first + 1, ... of [history | inputs].
void write_history(const CausalConv1dArgs& args, ConvBlock& b, int32_t slot, int64_t begin, int64_t first,
                   int64_t count) {
  const int64_t history = args.W - 1;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t entry = first + r;
    const float* values = row(b.history, entry);
    if (entry >= history) {
      load_row(args.x.dtype, channel(args.x.at(begin + entry - history, 0), args.x.dtype, b.first), b.count, b.out);
      values = b.out;
    }
    store_row(args.conv_state_dtype, values, b.count, state_row(args, b, slot, r));
  }
}

void copy_slot(const CausalConv1dArgs& args, const ConvBlock& b, int32_t from, int32_t to) {
  if (from == to) return;
  for (int64_t r = 0; r < args.R; ++r) {
    std::memcpy(state_row(args, b, to, r), state_row(args, b, from, r), b.count * size_of(args.conv_state_dtype));
  }
}

void convolve_sequence(const CausalConv1dArgs& args, int64_t n, ConvBlock& b) {
  const int64_t begin = args.cu_seqlens[n];
  const int64_t len = args.cu_seqlens[n + 1] - begin;
  const int32_t read_slot = args.read_slots[n];
  const int32_t write_slot = args.write_slots[n];
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
  for (int64_t r = 0; r < history; ++r) {
    if (has_initial_state) {
      load_row(args.conv_state_dtype, state_row(args, b, read_slot, first_row + r), b.count, row(b.history, r));
    } else {
      std::fill_n(row(b.history, r), b.count, 0.0f);
    }
  }
  std::copy_n(b.history, history * kConvBlock, b.window);
  for (int64_t chunk = 0; chunk < len; chunk += kTokens) {
    const int64_t count = std::min(kTokens, len - chunk);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t token = begin + chunk + t;
      load_row(args.x.dtype, channel(args.x.at(token, 0), args.x.dtype, b.first), b.count, row(b.window, history + t));
      convolve(args, b, row(b.window, t));
      store_row(args.out.dtype, b.out, b.count, out_channels(token));
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
  b.taps = scratch<ConvBlock>(kConvScratch);
  // Lanes past the last channel are computed and dropped.
  std::fill_n(b.taps, kConvScratch, 0.0f);
  b.bias = row(b.taps, 4);
  b.history = row(b.bias, 1);
  b.window = row(b.history, kMaxHistory);
  b.out = row(b.window, kMaxHistory + kTokens);
  for (int64_t item = begin; item < end; ++item) {
    if (item / args.N != b.index) load_block(args, item / args.N, b);
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
