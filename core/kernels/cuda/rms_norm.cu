// SPDX-License-Identifier: Apache-2.0
// residual_out = residual + x;  n = (1 + weight) * (s / rms(s)) of that sum s, over the last dimension;
// out = n, its first P elements rotated: n * cos + (-n_{i + P/2}, n_i) * sin.
//
// A warp or a block has a row, a thread 8 neighbours of it at a time, in registers. Rounding: inputs are widened
// exactly; the sum is rounded once, and what is normed is the rounded sum; out is rounded once, and before it, where n
// is rotated, n and both products. Order of the sum of squares: norm_rows.cuh.
#include "core/kernels/cuda/rms_norm.h"

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/norm_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kWarp = 32;

// Threads of a block: rows of a warp each, or one row.
template <int kThreads>
constexpr int kBlock = kThreads == kWarp ? 256 : kThreads;

// The sum of a row in each of its threads, which have one number for each of their packets: packet i * kThreads +
// thread.
template <int kThreads, int kPackets>
__device__ float sum_over_row(const float (&of_packets)[kPackets]) {
  if constexpr (kThreads == kWarp) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) sum += of_packets[i];
    return sum_over_lanes<kWarp>(sum);
  } else {
    __shared__ float packets[kPackets * kThreads];
#pragma unroll
    for (int i = 0; i < kPackets; ++i) packets[i * kThreads + threadIdx.x] = of_packets[i];
    __syncthreads();
    return sum_over_packets(packets, kPackets * kThreads);
  }
}

template <int kThreads>
__device__ void wait_for_row() {
  if constexpr (kThreads > kWarp) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// The weight of a packet, f32 or of the row's type, on its way.
template <class Element, bool kIsWhole>
class RawWeight {
 public:
  __device__ void load(const InRows& weight, int64_t first, int64_t end) {
    is_f32_ = weight.dtype == DType::kFloat32;
    is_f32_ ? f32_.load(static_cast<const float*>(weight.data), first, end)
            : elements_.load(static_cast<const Element*>(weight.data), first, end);
  }
  __device__ void widen(float (&x)[kPacket]) const { is_f32_ ? f32_.widen(x) : elements_.widen(x); }

 private:
  bool is_f32_;
  RawPacket<float, kIsWhole> f32_;
  RawPacket<Element, kIsWhole> elements_;
};

// kThreads of a row, which has at most kPackets packets for each.
template <class Element, int kThreads, int kPackets, bool kIsWhole, bool kIsRotated>
__global__ void __launch_bounds__(kBlock<kThreads>) norm_rows(RmsNormArgs args, int64_t num_rows) {
  extern __shared__ float to_rotate[];  // the first P normed elements of each row of the block
  const int thread = threadIdx.x % kThreads;
  const int row_of_block = threadIdx.x / kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock<kThreads> / kThreads) + row_of_block;
  const int64_t token = row / args.H;
  const int64_t head = row % args.H;
  const auto first_of = [thread](int i) { return static_cast<int64_t>(i * kThreads + thread) * kPacket; };
  if (kIsWhole && blockIdx.x == 0 && threadIdx.x == 0) {
    prefetch_row(args.weight.data, static_cast<uint32_t>(args.D * (args.weight.dtype == DType::kFloat32 ? 4 : 2)));
  }
  begin_overlapped();
  if (row >= num_rows) return;

  RawPacket<Element, kIsWhole> raw_x[kPackets], raw_residual[kPackets];
  const bool has_residual = args.residual.data != nullptr;
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    raw_x[i].load(row_of<Element>(args.x, token, head), first_of(i), args.D);
    if (has_residual) raw_residual[i].load(row_of<Element>(args.residual, token, head), first_of(i), args.D);
  }
  // What comes later waits beside the row, not behind it.
  RawWeight<Element, kIsWhole> raw_weight[kPackets];
  RawPacket<Element, kIsWhole> raw_cos[kPackets], raw_sin[kPackets];
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    raw_weight[i].load(args.weight, first_of(i), args.D);
    if (!kIsRotated || first_of(i) >= args.P) continue;
    raw_cos[i].load(row_of<Element>(args.cos, token, 0), first_of(i), args.P);
    raw_sin[i].load(row_of<Element>(args.sin, token, 0), first_of(i), args.P);
  }
  float x[kPackets][kPacket];
  float squares[kPackets];
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    raw_x[i].widen(x[i]);
    if (has_residual) {
      float residual[kPacket];
      raw_residual[i].widen(residual);
      add_residual<Element>(residual, x[i]);
      store_packet<kIsWhole>(row_of<Element>(args.residual_out, token, head), first_of(i), args.D, x[i]);
    }
    squares[i] = sum_of_squares(x[i]);
  }
  const float scale = norm_scale(sum_over_row<kThreads>(squares), args.D, args.eps);
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    float weight[kPacket];
    raw_weight[i].widen(weight);
    apply_norm(scale, weight, x[i]);
  }

  if constexpr (kIsRotated) {
    float* n = to_rotate + row_of_block * args.P;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
#pragma unroll
      for (int j = 0; j < kPacket; ++j) {
        if (first_of(i) + j < args.P) n[first_of(i) + j] = x[i][j] = rounded<Element>(x[i][j]);
      }
    }
    wait_for_row<kThreads>();
    const int64_t half = args.P / 2;
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
      if (first_of(i) >= args.P) continue;
      float cos[kPacket];
      float sin[kPacket];
      raw_cos[i].widen(cos);
      raw_sin[i].widen(sin);
#pragma unroll
      for (int j = 0; j < kPacket; ++j) {
        const int64_t column = first_of(i) + j;
        if (column >= args.P) continue;
        const float crossed = column < half ? -n[column + half] : n[column - half];
        x[i][j] = rounded<Element>(x[i][j] * cos[j]) + rounded<Element>(crossed * sin[j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPackets; ++i) {
    store_packet<kIsWhole>(row_of<Element>(args.out, token, head), first_of(i), args.D, x[i]);
  }
}

template <class Element, int kThreads, int kPackets>
void launch(const RmsNormArgs& args, int64_t num_rows, cudaStream_t stream) {
  constexpr int kRows = kBlock<kThreads> / kThreads;
  const bool is_rotated = args.P > 0;
  const bool is_whole =
      args.D % kPacket == 0 && is_aligned(args.x) && is_aligned(args.out) &&
      reinterpret_cast<uintptr_t>(args.weight.data) % 16 == 0 &&
      (args.residual.data == nullptr || (is_aligned(args.residual) && is_aligned(args.residual_out))) &&
      (!is_rotated || (args.P % kPacket == 0 && is_aligned(args.cos) && is_aligned(args.sin)));
  const auto kernel = is_whole ? (is_rotated ? norm_rows<Element, kThreads, kPackets, true, true>
                                             : norm_rows<Element, kThreads, kPackets, true, false>)
                               : (is_rotated ? norm_rows<Element, kThreads, kPackets, false, true>
                                             : norm_rows<Element, kThreads, kPackets, false, false>);
  const auto bytes = static_cast<size_t>(kRows * args.P) * sizeof(float);
  launch_overlapping(kernel, static_cast<unsigned>(ceil_div(num_rows, kRows)), kBlock<kThreads>, bytes, /*cluster=*/1,
                     stream, args, num_rows);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int64_t num_tokens, cudaStream_t stream) {
  const int64_t num_rows = num_tokens * args.H;
  if (num_rows == 0 || args.D == 0) return;
  with_element(args.out.dtype, [&](auto element) {
    using Element = decltype(element);
    if (args.D <= 256) {
      launch<Element, 32, 1>(args, num_rows, stream);
    } else if (args.D <= 1024 && num_rows > num_multiprocessors()) {
      launch<Element, 32, 4>(args, num_rows, stream);
    } else if (args.D <= 1024) {  // few rows: what counts is how soon one is done
      launch<Element, 128, 1>(args, num_rows, stream);
    } else if (args.D <= 2048) {
      launch<Element, 256, 1>(args, num_rows, stream);
    } else {
      launch<Element, 256, 4>(args, num_rows, stream);
    }
  });
  check_launch("rms_norm");
}

}  // namespace xgdn::kernel::cuda
