// SPDX-License-Identifier: Apache-2.0
// A channel of the causal convolution over its window: shared by the ops and the fused decode step.
//
// Rounding: inputs, taps and history are widened exactly, sums are f32 (bias first, then taps ascending).
#pragma once

#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

inline constexpr int kMaxTaps = 4;
inline constexpr int kMaxHistory = kMaxTaps - 1;

/// The address of a slot's row, of the first channel.
__device__ inline char* history_row(const CausalConv1dArgs& a, int32_t slot, int64_t row) {
  return static_cast<char*>(a.conv_state.data) +
         (slot * a.conv_state.stride + row * a.D) * (a.conv_state.dtype == DType::kFloat32 ? 4 : 2);
}

/// Taps and bias of a channel.
struct ConvChannel {
  float taps[kMaxTaps];
  float bias;

  /// window: the W inputs that end at the current token; what is behind them is finite.
  __device__ float apply(const float (&window)[kMaxTaps], bool has_silu) const {
    float y = bias;
#pragma unroll
    for (int w = 0; w < kMaxTaps; ++w) y = fmaf(taps[w], window[w], y);
    return has_silu ? silu(y) : y;
  }
};

/// Taps and bias of a channel, on their way.
template <class In>
struct RawConvChannel {
  using Taps = std::conditional_t<sizeof(In) == 4, uint4, uint2>;
  alignas(Taps) In taps[kMaxTaps];
  In bias;

  __device__ void load(const CausalConv1dArgs& a, int64_t channel) {
    const In* const weight = static_cast<const In*>(a.weight) + channel * a.W;
    if (a.W == kMaxTaps && reinterpret_cast<uintptr_t>(a.weight) % sizeof(Taps) == 0) {
      *reinterpret_cast<Taps*>(taps) = *reinterpret_cast<const Taps*>(weight);
    } else {
#pragma unroll
      for (int w = 0; w < kMaxTaps; ++w) {
        if (w < a.W) taps[w] = weight[w];
      }
    }
    if (a.bias != nullptr) bias = static_cast<const In*>(a.bias)[channel];
  }
  __device__ ConvChannel widened(const CausalConv1dArgs& a) const {
    ConvChannel conv;
#pragma unroll
    for (int w = 0; w < kMaxTaps; ++w) conv.taps[w] = w < a.W ? cuda::widened(taps[w]) : 0.0f;
    conv.bias = a.bias == nullptr ? 0.0f : cuda::widened(bias);
    return conv;
  }
};

/// The W-1 inputs before the current one, on their way.
struct RawHistory {
  RawScalar rows[kMaxHistory];

  __device__ void load(const CausalConv1dArgs& a, int32_t slot, int64_t first_row, int64_t channel) {
#pragma unroll
    for (int r = 0; r < kMaxHistory; ++r) {
      if (r < a.W - 1) rows[r].load(a.conv_state.dtype, history_row(a, slot, first_row + r), channel);
    }
  }
  /// Zeros behind them.
  __device__ void widen(const CausalConv1dArgs& a, float (&window)[kMaxTaps]) const {
    window[kMaxHistory] = 0.0f;
#pragma unroll
    for (int r = 0; r < kMaxHistory; ++r) window[r] = r < a.W - 1 ? rows[r].widened(a.conv_state.dtype) : 0.0f;
  }
};

/// Makes room for the next input at window[W-1].
__device__ inline void shift(int64_t W, float (&window)[kMaxTaps]) {
#pragma unroll
  for (int w = 0; w + 1 < kMaxTaps; ++w) {
    if (w < W - 1) window[w] = window[w + 1];
  }
}

/// window[W-1] = x, with indices that are known when compiling.
__device__ inline void set_newest(int64_t W, float x, float (&window)[kMaxTaps]) {
#pragma unroll
  for (int w = 1; w < kMaxTaps; ++w) {
    if (w == W - 1) window[w] = x;
  }
}

/// A channel of one token, on its way: taps, history and input.
template <class In>
struct RawConv {
  RawConvChannel<In> channel;
  RawHistory history;
  In input;

  __device__ void load_inputs(const CausalConv1dArgs& a, int64_t token, int64_t index) {  // all but the history
    input = row_of<In>(a.x, token, 0)[index];
    channel.load(a, index);
  }
  /// Leaves the window behind.
  __device__ float apply(const CausalConv1dArgs& a, float (&window)[kMaxTaps]) const {
    history.widen(a, window);
    set_newest(a.W, cuda::widened(input), window);
    return channel.widened(a).apply(window, a.silu);
  }
};

}  // namespace xgdn::kernel::cuda
