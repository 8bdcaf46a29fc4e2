// SPDX-License-Identifier: Apache-2.0
// A thread takes a channel and a run of tokens, whose window it keeps in registers.
#include "core/kernels/cuda/causal_conv1d.h"

#include "core/kernels/cuda/conv_taps.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRun = 16;  // tokens of a thread in a prefill

// The sequence that holds the token.
__device__ int64_t sequence_of(const int32_t* cu_seqlens, int64_t N, int64_t token) {
  int64_t low = 0, high = N;  // cu_seqlens[low] <= token < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

template <class In>
__device__ float input(const CausalConv1dArgs& a, int64_t token, int64_t channel) {
  return widened(row_of<In>(a.x, token, 0)[channel]);
}

// Entry `entry` of [history | inputs] of a sequence.
template <class In>
__device__ float entry_of(const CausalConv1dArgs& a, int64_t n, int64_t begin, int64_t entry, int64_t channel) {
  const int64_t history = a.W - 1;
  if (entry >= history) return input<In>(a, begin + entry - history, channel);
  if (a.has_initial_state != nullptr && !a.has_initial_state[n]) return 0.0f;
  return load_scalar(a.conv_state.dtype, history_row(a, a.conv_state.read[n], entry), channel);
}

// Outputs alone: a run may begin in one sequence and end in another.
template <class In>
__global__ void prefill_kernel(const __grid_constant__ CausalConv1dArgs a, int64_t T) {
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRun;
  const int64_t last = first + kRun < T ? first + kRun : T;
  if (channel >= a.D) return;
  RawConvChannel<In> raw;
  raw.load(a, channel);
  const ConvChannel conv = raw.widened(a);
  int64_t n = sequence_of(a.cu_seqlens, a.N, first);
  int64_t begin = a.cu_seqlens[n], end = a.cu_seqlens[n + 1];
  float window[kMaxTaps] = {};
  const auto fill_window = [&](int64_t token) {
    if (a.conv_state.read[n] < 0) return;
#pragma unroll
    for (int w = 0; w < kMaxHistory; ++w) {
      if (w < a.W - 1) window[w] = entry_of<In>(a, n, begin, token - begin + w, channel);
    }
  };
  fill_window(first);
  for (int64_t token = first; token < last; ++token) {
    if (token == end) {
      do {
        begin = end;
        end = a.cu_seqlens[++n + 1];
      } while (begin == end);
      fill_window(token);
    }
    float y = 0.0f;
    if (a.conv_state.read[n] >= 0) {
      set_newest(a.W, input<In>(a, token, channel), window);
      y = conv.apply(window, a.silu);
      shift(a.W, window);
    }
    store_scalar(a.out.dtype, row_of(a.out, token, 0), channel, y);
  }
}

// The sequence's last W-1 inputs, of [history | inputs]; behind the outputs, which read the slot.
template <class In>
__global__ void final_state_kernel(const __grid_constant__ CausalConv1dArgs a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t n = blockIdx.x;
  const int32_t write = a.conv_state.write[n];
  if (channel >= a.D || a.conv_state.read[n] < 0 || write < 0) return;
  const int64_t begin = a.cu_seqlens[n], len = a.cu_seqlens[n + 1] - begin;
  float rows[kMaxHistory];
#pragma unroll
  for (int r = 0; r < kMaxHistory; ++r) {
    if (r < a.W - 1) rows[r] = entry_of<In>(a, n, begin, len + r, channel);
  }
#pragma unroll
  for (int r = 0; r < kMaxHistory; ++r) {
    if (r < a.W - 1) store_scalar(a.conv_state.dtype, history_row(a, write, r), channel, rows[r]);
  }
}

// The rows become [history | inputs] without the oldest one. The thread reads what it needs before it writes it, row r
// from row first_row + r + 1 on.
template <class In>
__global__ void update_kernel(const __grid_constant__ CausalConv1dArgs a) {
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int64_t n = blockIdx.x;
  begin_overlapped();
  if (channel >= a.D) return;
  const int64_t begin = a.cu_seqlens[n], len = a.cu_seqlens[n + 1] - begin;
  const int32_t read = a.conv_state.read[n], write = a.conv_state.write[n];
  const DType dtype = a.conv_state.dtype;
  if (read < 0) {
    for (int64_t t = 0; t < len; ++t) store_scalar(a.out.dtype, row_of(a.out, begin + t, 0), channel, 0.0f);
    return;
  }
  if (len == 0) {
    for (int64_t r = 0; write >= 0 && write != read && r < a.R; ++r) {
      store_scalar(dtype, history_row(a, write, r), channel, load_scalar(dtype, history_row(a, read, r), channel));
    }
    return;
  }
  RawConvChannel<In> raw;
  raw.load(a, channel);
  RawHistory history;
  history.load(a, read, a.num_accepted == nullptr ? 0 : a.num_accepted[n] - 1, channel);
  const ConvChannel conv = raw.widened(a);
  float window[kMaxTaps];
  history.widen(a, window);
  int64_t row = 0;
  const auto keep = [&](float x) {
    if (write >= 0) store_scalar(dtype, history_row(a, write, row++), channel, x);
  };
#pragma unroll
  for (int w = 1; w < kMaxHistory; ++w) {
    if (w < a.W - 1) keep(window[w]);
  }
  for (int64_t t = 0; t < len; ++t) {
    const float x = input<In>(a, begin + t, channel);
    set_newest(a.W, x, window);
    store_scalar(a.out.dtype, row_of(a.out, begin + t, 0), channel, conv.apply(window, a.silu));
    keep(x);
    shift(a.W, window);
  }
}

dim3 blocks(const CausalConv1dArgs& a, int64_t rows) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(a.D, kThreads)));
}

}  // namespace

void causal_conv1d(const CausalConv1dArgs& args, int64_t T, cudaStream_t stream) {
  with_element(args.x.dtype, [&](auto in) {
    using In = decltype(in);
    if (T > 0) prefill_kernel<In><<<blocks(args, ceil_div(T, kRun)), kThreads, 0, stream>>>(args, T);
    if (args.N > 0) final_state_kernel<In><<<blocks(args, args.N), kThreads, 0, stream>>>(args);
  });
  check_launch("causal_conv1d");
}

void causal_conv1d_update(const CausalConv1dArgs& args, cudaStream_t stream) {
  if (args.N == 0) return;
  with_element(args.x.dtype, [&](auto in) {
    launch_overlapping(update_kernel<decltype(in)>, blocks(args, args.N), kThreads, /*shared_bytes=*/0, /*cluster=*/1,
                       stream, args);
  });
  check_launch("causal_conv1d_update");
}

}  // namespace xgdn::kernel::cuda
