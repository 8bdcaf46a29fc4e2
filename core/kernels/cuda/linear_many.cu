// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias of 9 to 32 tokens and very many outputs: a vocabulary.
//
// All tokens lie in shared memory. A warp has 8 outputs at a time and all of D, so that no warp waits for another one:
// while it multiplies pieces of two classes, neighbours in memory, those of the next two are on their way. Products,
// their order and their rounding are those of linear.cu, where the sums of the classes are those of warps.
#include "core/kernels/cuda/linear_many.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/linear_pieces.cuh"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

// Of a block, which has a multiprocessor: as many as its registers are enough for.
template <int kPairs>
constexpr int kWarps = kPairs == 1 ? 16 : 12;
constexpr int kAtOnce = 2;    // classes
constexpr int kTogether = 4;  // pieces of a class that are multiplied while the next ones come

// Of every 16 tokens those 8 apart lie side by side, as the left side of a product wants them. Such pairs, whose second
// token may be missing.
__host__ __device__ int units_of(int T) {
  return T / (2 * kTile) * kTile + (T % (2 * kTile) < kTile ? T % (2 * kTile) : kTile);
}

__device__ int first_token_of(int unit) {
  return unit / kTile * 2 * kTile + unit % kTile;
}

// Elements from pair to pair, such that lanes of one product read different banks.
__host__ __device__ int pair_stride(int64_t D) {
  return static_cast<int>((2 * D + 63) / 64 * 64 + 8);
}

// A packet of both: what a lane gives to a product of first, and of second halves.
__device__ void store_pair(uint4* to, const uint4& first, const uint4& second) {
  to[0] = {first.x, second.x, first.y, second.y};
  to[1] = {first.z, second.z, first.w, second.w};
}

// Brings all tokens, by all threads of a block.
template <int kThreads>
__device__ void bring_pairs(const LinearArgs& a, uint4* to) {
  const int packets = static_cast<int>(a.D) / kPacket;
  const int stride = pair_stride(a.D) / kPacket;
#pragma unroll 2
  for (int i = threadIdx.x; i < units_of(static_cast<int>(a.T)) * packets; i += kThreads) {
    const int unit = i / packets, packet = i % packets;
    const int token = first_token_of(unit);
    const int other = min(token + kTile, static_cast<int>(a.T) - 1);
    store_pair(to + unit * stride + packet * 2, reinterpret_cast<const uint4*>(row_of<BFloat16>(a.x, token, 0))[packet],
               reinterpret_cast<const uint4*>(row_of<BFloat16>(a.x, other, 0))[packet]);
  }
}

// Where a warp is in its walk over outputs, classes and pieces.
struct Place {
  int64_t group;  // of outputs
  int first_class;
  int first;  // of a class's pieces
};

template <int kPairs>  // tiles of 16 tokens
class Walk {
 public:
  __device__ Walk(const LinearArgs& args, int num_classes, const uint4* tokens)
      : a_(args),
        num_classes_(num_classes),
        num_pieces_(static_cast<int>(args.D) / kPiece),
        num_groups_((args.O + kTile - 1) / kTile),
        lane_(static_cast<int>(threadIdx.x) % 32) {
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      const int unit = min(m * kTile + lane_ / 4, units_of(static_cast<int>(args.T)) - 1);
      tokens_[m] = tokens + unit * (pair_stride(args.D) / kPacket) + lane_ % 4 * 2;
    }
  }

  __device__ bool has(const Place& place) const {
    return place.group < num_groups_;
  }

  __device__ void advance(Place& place) const {
    if (piece(place, 0, kTogether) < num_pieces_) {
      place.first += kTogether;
      return;
    }
    place.first = 0;
    place.first_class += kAtOnce;
    if (place.first_class < num_classes_) return;
    place.first_class = 0;
    place.group += static_cast<int64_t>(gridDim.x) * kWarps<kPairs>;
  }

  using Packets = uint4[kTogether][kAtOnce];

  // Starts to load.
  __device__ void load(const Place& place, Packets& w) const {
    if (!has(place)) return;
    const int64_t output = min(place.group * kTile + lane_ / 4, a_.O - 1);
    const auto* const row = static_cast<const BFloat16*>(a_.weight) + output * a_.weight_stride + lane_ % 4 * kPacket;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (piece(place, c, i) < num_pieces_) {
          w[i][c] = __ldcs(reinterpret_cast<const uint4*>(row + piece(place, c, i) * kPiece));
        }
      }
    }
  }

  // Adds what was loaded, and stores the group's outputs with the last of it.
  __device__ void multiply(const Place& place, const Packets& w) {
    if (place.first == 0) begin(place);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (piece(place, c, i) >= num_pieces_) break;
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          const uint4* const x = tokens_[m] + piece(place, c, i) * (2 * kPacketsOfPiece);
          const uint4 first = x[0], second = x[1];
          const uint32_t even[4] = {first.x, first.y, first.z, first.w};
          const uint32_t odd[4] = {second.x, second.y, second.z, second.w};
          multiply_bf16(sums_[c][0][m], even, w[i][c].x, w[i][c].y);
          multiply_bf16(sums_[c][1][m], odd, w[i][c].z, w[i][c].w);
        }
      }
    }
    if (piece(place, 0, kTogether) < num_pieces_) return;
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) total_[m][i] += sums_[c][0][m][i] + sums_[c][1][m][i];
      }
    }
    if (place.first_class + kAtOnce == num_classes_) store(place);
  }

 private:
  // The i-th from the place's first on, of the c-th of its classes.
  __device__ int piece(const Place& place, int c, int i) const {
    return place.first_class + c + (place.first + i) * num_classes_;
  }

  // Of a lane's i-th sum.
  __device__ int64_t output(const Place& place, int i) const {
    return place.group * kTile + lane_ % 4 * 2 + i % 2;
  }

  __device__ void begin(const Place& place) {
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) sums_[c][0][m][i] = sums_[c][1][m][i] = 0.0f;
        if (place.first_class > 0) continue;
        const bool has_bias = a_.bias.data != nullptr && output(place, i) < a_.O;
        total_[m][i] = has_bias ? load_scalar(a_.bias.dtype, a_.bias.data, output(place, i)) : 0.0f;
      }
    }
  }

  __device__ void store(const Place& place) const {
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = (2 * m + i / 2) * kTile + lane_ / 4;
        if (token >= a_.T || output(place, i) >= a_.O) continue;
        store_scalar(a_.out.dtype, row_of(a_.out, token, 0), output(place, i), total_[m][i]);
      }
    }
  }

  const LinearArgs& a_;
  int num_classes_;
  int num_pieces_;
  int64_t num_groups_;
  int lane_;
  const uint4* tokens_[kPairs];
  float total_[kPairs][4];
  float sums_[kAtOnce][2][kPairs][4];  // of first and of second halves
};

template <int kPairs>
__global__ void __launch_bounds__(32 * kWarps<kPairs>, 1)
    many_kernel(const __grid_constant__ LinearArgs a, int num_classes) {
  extern __shared__ uint4 tokens[];
  let_next_kernel_launch();
  Walk<kPairs> walk(a, num_classes, tokens);
  Place place{blockIdx.x + static_cast<int64_t>(gridDim.x) * (threadIdx.x / 32), 0, 0};
  typename Walk<kPairs>::Packets w[2];
  if (a.has_constant_weight) walk.load(place, w[0]);
  wait_for_kernel_before();
  if (!a.has_constant_weight) walk.load(place, w[0]);
  bring_pairs<32 * kWarps<kPairs>>(a, tokens);
  __syncthreads();
#pragma unroll 1
  while (walk.has(place)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Place next = place;
      walk.advance(next);
      walk.load(next, w[1 - i]);
      if (walk.has(place)) walk.multiply(place, w[i]);
      place = next;
    }
  }
}

template <int kPairs>
void launch(const LinearArgs& args, size_t bytes, cudaStream_t stream) {
  launch_overlapping(many_kernel<kPairs>, dim3(static_cast<unsigned>(num_multiprocessors())), 32 * kWarps<kPairs>,
                     bytes,
                     /*cluster=*/1, stream, args, args.D > kMostOfFewClasses ? kManyClasses : kFewClasses);
}

int64_t shared_bytes(const LinearArgs& args) {
  return 2 * units_of(static_cast<int>(args.T)) * pair_stride(args.D);
}

}  // namespace

bool linear_has_many(const LinearArgs& args) {
  constexpr int kMostBytes = 144 << 10;  // beside them the first-level cache has room for the weights under way
  const int most = std::min(kMostBytes, device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>());
  return args.T > kTile && args.norm_weight.data == nullptr && !args.silu_and_mul &&
         args.O >= int64_t{2 * kTile} * kWarps<1> * num_multiprocessors() && shared_bytes(args) <= most;
}

void linear_of_many(const LinearArgs& args, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(shared_bytes(args));
  args.T <= 2 * kTile ? launch<1>(args, bytes, stream) : launch<2>(args, bytes, stream);
}

}  // namespace xgdn::kernel::cuda
