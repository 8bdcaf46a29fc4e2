// SPDX-License-Identifier: Apache-2.0
// A block of channels of the depthwise causal convolution with SiLU, inside one instruction set: shared by the ops and
// the fused decode step, so that they give the same bits.
//
//   y[t, c] = bias[c] + sum_w weight[c, w] in[t + w, c],  in = [history: W-1 rows | x],  out = y sigmoid(y)
//
// Rounding: inputs, taps and history are widened exactly, sums are f32 (bias first, then taps ascending), inputs are
// rounded to the pool's type when they become history. The caller rounds out, once.
#if defined(XGDN_CORE_KERNELS_CPU_CAUSAL_CONV1D_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CAUSAL_CONV1D_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CAUSAL_CONV1D_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CAUSAL_CONV1D_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "core/kernels/cpu/causal_conv1d.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr int64_t kMaxTaps = 4;
inline constexpr int64_t kMaxHistory = kMaxTaps - 1;

// At most kConvBlock channels in f32. Rows are kConvBlock apart.
struct ConvBlock {
  int64_t first = 0;  // channel
  int64_t count = 0;
  float* taps;     // [W]
  float* bias;     // [1]
  float* history;  // [W-1]
  float* window;   // [W-1 + tokens]  history, then inputs; at least kMaxTaps rows
  float* out;      // [1]
};

inline float* row(float* rows, int64_t i) {
  return rows + i * kConvBlock;
}

inline const char* channel(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * size_of(dtype);
}

inline char* state_row(const CausalConv1dArgs& args, const ConvBlock& b, int32_t slot, int64_t r) {
  return static_cast<char*>(args.conv_state.data) +
         (slot * args.conv_state.stride + r * args.D + b.first) * size_of(args.conv_state.dtype);
}

// [channels, W] to [W, channels].
inline void transpose_taps(const float* HWY_RESTRICT by_channel, int64_t W, ConvBlock& b) {
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

// The taps are transposed to [W, channels] once and serve all tokens.
inline void load_taps(const CausalConv1dArgs& args, int64_t first, int64_t count, ConvBlock& b) {
  b.first = first;
  b.count = count;
  float* by_channel = b.window;
  load_row(args.x.dtype, channel(args.weight, args.x.dtype, first * args.W), count * args.W, by_channel);
  transpose_taps(by_channel, args.W, b);
  if (args.bias != nullptr) load_row(args.x.dtype, channel(args.bias, args.x.dtype, first), count, b.bias);
}

inline void load_input(const CausalConv1dArgs& args, const ConvBlock& b, int64_t token, float* to) {
  load_row(args.x.dtype, channel(args.x.at(token, 0), args.x.dtype, b.first), b.count, to);
}

// Rows first_row, first_row + 1, ... of a slot.
inline void load_history(const CausalConv1dArgs& args, const ConvBlock& b, int32_t slot, int64_t first_row, float* to) {
  for (int64_t r = 0; r < args.W - 1; ++r) {
    load_row(args.conv_state.dtype, state_row(args, b, slot, first_row + r), b.count, row(to, r));
  }
}

template <int kW>
void convolve_token(const ConvBlock& b, const float* HWY_RESTRICT window, bool has_silu) {
  const F32 d;
  for (size_t i = 0; i < padded(b.count); i += hn::Lanes(d)) {
    VF y = hn::Load(d, b.bias + i);
    for (int w = 0; w < kW; ++w) {
      y = hn::MulAdd(hn::Load(d, b.taps + w * kConvBlock + i), hn::Load(d, window + w * kConvBlock + i), y);
    }
    hn::Store(has_silu ? silu(d, y) : y, d, b.out + i);
  }
}

inline void convolve(const CausalConv1dArgs& args, const ConvBlock& b, const float* window) {
  switch (args.W) {
    case 2:
      return convolve_token<2>(b, window, args.silu);
    case 3:
      return convolve_token<3>(b, window, args.silu);
    default:
      return convolve_token<4>(b, window, args.silu);
  }
}

// A sequence of one token: b.out is its result, the slot that is written keeps the history without its oldest row.
inline void convolve_decode(const CausalConv1dArgs& args, int64_t n, int64_t token, int64_t first_row,
                            const ConvBlock& b) {
  const int64_t history = args.W - 1;
  const int32_t from = args.conv_state.read[n];
  load_history(args, b, from, first_row, b.window);
  load_input(args, b, token, row(b.window, history));
  convolve(args, b, b.window);
  const int32_t to = args.conv_state.write[n];
  if (to < 0) return;
  for (int64_t r = 0; r < history - 1; ++r) {
    std::memcpy(state_row(args, b, to, r), state_row(args, b, from, first_row + r + 1),
                b.count * size_of(args.conv_state.dtype));
  }
  store_row(args.conv_state.dtype, row(b.window, history), b.count, state_row(args, b, to, history - 1));
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CAUSAL_CONV1D_INL_H_
