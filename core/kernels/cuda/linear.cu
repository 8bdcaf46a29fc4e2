// SPDX-License-Identifier: Apache-2.0
// A block takes 16 outputs for all tokens; its 8 or 16 warps take turns with pieces of 32 of D, and their sums are
// added in order at the end.
//
// A lane reads 8 neighbours of a row at once, 16 bytes, and gives them to the tensor core as if they were the pairs
// that it wants of two depths of 16: the tokens are read in the same order, and a sum does not mind.
// Most of a small product's time is the way of the weight from memory, which begins ahead of the wait for the tokens.
// Rounding: products and sums are f32, over a warp's pieces in order, then over the warps; rounded once.
#include "core/kernels/cuda/linear.h"

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kFewWarps = 8;
constexpr int kManyWarps = 16;
constexpr int kOutputs = 16;    // of a block
constexpr int kPiece = 32;      // of D
constexpr int kTileTokens = 8;  // of a product
constexpr int kMostTokens = 16;
constexpr int kInFlight = 4;  // pieces of a warp

__device__ uint4 load_packet(const __nv_bfloat16* from) {
  return __ldcs(reinterpret_cast<const uint4*>(from));
}

// The rows of the block, some by each warp: lanes would start theirs one after the other.
template <int kWarps>
__device__ void prefetch_rows(const LinearArgs& a, int64_t first_output) {
  constexpr int kRowsOfWarp = kOutputs / kWarps;
  if (threadIdx.x % 32 != 0) return;
  const int64_t first = first_output + threadIdx.x / 32 * kRowsOfWarp;
  const auto* const weight = static_cast<const __nv_bfloat16*>(a.weight);
#pragma unroll
  for (int64_t output = first; output < first + kRowsOfWarp; ++output) {
    if (output < a.O) prefetch_row(weight + output * a.weight_stride, static_cast<uint32_t>(a.D * 2));
  }
}

template <int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) linear_kernel(const __grid_constant__ LinearArgs a) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row = lane / 4;         // of the outputs, and of a tile's tokens
  const int column = lane % 4 * 8;  // of a piece
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kOutputs;
  prefetch_rows<kWarps>(a, first_output);  // while the kernel before still runs
  begin_overlapped();

  const auto* const weight = static_cast<const __nv_bfloat16*>(a.weight) + column;
  const __nv_bfloat16* const upper = weight + min(first_output + row, a.O - 1) * a.weight_stride;
  const __nv_bfloat16* const lower = weight + min(first_output + row + 8, a.O - 1) * a.weight_stride;
  const __nv_bfloat16* tokens[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    tokens[t] = row_of<__nv_bfloat16>(a.x, min(static_cast<int64_t>(t * kTileTokens + row), a.T - 1), 0) + column;
  }

  float sums[kTiles][4] = {};
  const int num_pieces = static_cast<int>(a.D / kPiece);
  for (int first = warp; first < num_pieces; first += kWarps * kInFlight) {
    uint4 w[kInFlight][2], x[kInFlight][kTiles];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int piece = first + i * kWarps;
      if (piece >= num_pieces) break;
      w[i][0] = load_packet(upper + piece * kPiece);
      w[i][1] = load_packet(lower + piece * kPiece);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) x[i][t] = *reinterpret_cast<const uint4*>(tokens[t] + piece * kPiece);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarps >= num_pieces) break;
      const uint32_t even[4] = {w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y};
      const uint32_t odd[4] = {w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        multiply_bf16(sums[t], even, x[i][t].x, x[i][t].y);
        multiply_bf16(sums[t], odd, x[i][t].z, x[i][t].w);
      }
    }
  }

  __shared__ float parts[kWarps][kTiles * kTileTokens][kOutputs + 1];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) parts[warp][t * kTileTokens + lane % 4 * 2 + i % 2][row + i / 2 * 8] = sums[t][i];
  }
  __syncthreads();
  const int token = threadIdx.x / kOutputs;
  const int64_t output = first_output + threadIdx.x % kOutputs;
  if (token >= a.T || token >= kTiles * kTileTokens || output >= a.O) return;
  float sum = a.bias.data == nullptr ? 0.0f : load_scalar(a.bias.dtype, a.bias.data, output);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w][token][threadIdx.x % kOutputs];
  store_scalar(a.out.dtype, row_of(a.out, token, 0), output, sum);
}

static_assert(32 * kFewWarps >= kMostTokens * kOutputs);

template <int kWarps>
void launch(const LinearArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(args.O, kOutputs)));
  launch_overlapping(args.T <= kTileTokens ? linear_kernel<1, kWarps> : linear_kernel<2, kWarps>, grid, 32 * kWarps,
                     /*shared_bytes=*/0, /*cluster=*/1, stream, args);
}

}  // namespace

bool linear_supports(const LinearArgs& args) {
  return args.T <= kMostTokens && args.x.dtype == DType::kBFloat16 && args.D % kPiece == 0 && args.D > 0 &&
         is_aligned(args.x) && reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.weight_stride % 8 == 0;
}

void linear(const LinearArgs& args, cudaStream_t stream) {
  if (args.T == 0 || args.O == 0) return;
  // With long rows more warps, so that few outputs too have enough bytes on their way.
  if (args.D > kFewWarps * kInFlight * kPiece) {
    launch<kManyWarps>(args, stream);
  } else {
    launch<kFewWarps>(args, stream);
  }
  check_launch("linear");
}

}  // namespace xgdn::kernel::cuda
