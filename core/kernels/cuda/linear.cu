// SPDX-License-Identifier: Apache-2.0
// out = y weight^T + bias of few tokens, where y is x, or n = rms_norm(residual + x);
// with silu_and_mul out = silu(gate) * up of outputs [gate | up].
//
// A block takes 8, 16 or 32 outputs for all tokens, half of them of gate and the same of up; a warp has a class of
// pieces of D (linear_pieces.cuh), and the classes' sums are added in order at the end. A lane reads 8 neighbours of a
// row at once, 16 bytes, and gives them to the tensor core as if they were the pairs that it wants of two depths of 16:
// tokens and weights are read in the same order, and a sum does not mind. A product has sixteen rows of tokens and
// eight of outputs, or, of tokens in shared memory, sixteen of outputs and eight of tokens.
//
// Norm: every block norms all tokens for itself, into shared memory, which costs it less than a kernel in between costs
// all. Block 0 writes residual_out, which is other memory, since any block may still read the residual.
// Time: that of a small product is the way of the weight. What the registers of the blocks hold is on its way before
// the wait for the kernel before where the weight is constant; rows that are longer, or of a weight that an op may have
// written, start for the second-level cache.
// Rounding: products and sums are f32, rounded once. Around them as if the ops ran one after the other: the sum with
// the residual, n, gate and up are rounded.
#include "core/kernels/cuda/linear.h"

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/linear_many.h"
#include "core/kernels/cuda/linear_pieces.cuh"
#include "core/kernels/cuda/norm_rows.cuh"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {
namespace {

using BFloat16 = __nv_bfloat16;

constexpr int kMostTokens = 32;
constexpr int kFewTokens = 8;
constexpr int64_t kMostStaged = 48 << 10;  // elements of all tokens in shared memory
constexpr int64_t kMostNormed = 8192;      // elements of all tokens that a block norms

// What a kernel is made for. kTokens: 8, 16 or 32.
template <int kTokens_, int kTiles_, int kWarps_, bool kNorms_, bool kGates_>
struct Form {
  static constexpr int kTokens = kTokens_;
  static constexpr int kTiles = kTiles_;  // of outputs; with kGates of gate and of up
  static constexpr int kWarps = kWarps_;
  static constexpr bool kNorms = kNorms_;
  static constexpr bool kGates = kGates_;
  static_assert(!kGates || kTiles % 2 == 0);

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPieces = kTiles == 1 ? 8 : 4;                // of a warp in flight
  static constexpr int kResultTiles = kGates ? kTiles / 2 : kTiles;  // gate before up
  static constexpr int kResults = kTile * kResultTiles;              // of a token and block
  // Tokens go through shared memory where they are few, or where the registers hold all of the weights; else to
  // registers.
  static constexpr bool kIsStaged = kTokens == kFewTokens || kTiles == 4;
  static_assert(kTokens == kFewTokens || kTiles < 4 || kPiece * kPieces * kWarps >= kMostOfFewClasses);
  // Registers are what bounds how much of the weights is on its way ahead of the wait: beside a block of a kernel there
  // is room for one of the next. With four tiles that is for two blocks, and 128 threads of 96 registers.
  static constexpr int kRegisters = kTiles == 4 ? 104 : kIsStaged ? 64 : 128;
};

__device__ uint4 load_packet(const BFloat16* from) {
  return __ldcs(reinterpret_cast<const uint4*>(from));
}

// Of tokens in shared memory, such that lanes of one product read different banks.
__host__ __device__ inline int64_t row_stride(int64_t D) {
  return (D + 63) / 64 * 64 + 32;
}

// Output `row` of a tile of the block.
template <class F>
__device__ int64_t output_of(const LinearArgs& a, int tile, int row) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * F::kResults;
  return tile / F::kResultTiles * (a.O / 2) + first + tile % F::kResultTiles * kTile + row;
}

// The row of its weight; where there is none, another one of the tile.
template <class F>
__device__ const BFloat16* weight_row(const LinearArgs& a, int tile, int row) {
  const int64_t end = F::kGates && tile < F::kResultTiles ? a.O / 2 : a.O;
  return static_cast<const BFloat16*>(a.weight) + min(output_of<F>(a, tile, row), end - 1) * a.weight_stride;
}

// The rows of the block, one by each of some warps: lanes would start theirs one after the other.
template <class F>
__device__ void prefetch_rows(const LinearArgs& a) {
  if (threadIdx.x % 32 != 0) return;
  for (int i = threadIdx.x / 32; i < F::kTiles * kTile; i += F::kWarps) {
    prefetch_row(weight_row<F>(a, i / kTile, i % kTile), static_cast<uint32_t>(a.D * 2));
  }
}

// The tokens in shared memory, brought or normed by all threads of the block. Of a norm there are its weight, too, and
// a sum of squares for each packet.
template <class F>
class TokenRows {
 public:
  __host__ static int64_t shared_bytes(const LinearArgs& a) {
    const int64_t tokens = 2 * a.T * row_stride(a.D);
    const int64_t residual = a.residual.data != nullptr ? 2 * a.T * a.D : 0;
    return F::kNorms ? tokens + 2 * a.D + residual + 4 * a.T * (a.D / kPacket) : tokens;
  }

  __device__ TokenRows(const LinearArgs& args, uint4* shared)
      : a_(args),
        packets_(static_cast<int>(args.D) / kPacket),
        rows_(reinterpret_cast<BFloat16*>(shared)),
        weight_(rows_ + args.T * row_stride(args.D)),
        residual_(weight_ + args.D),
        squares_(reinterpret_cast<float*>(residual_ + (args.residual.data != nullptr ? args.T * args.D : 0))) {}

  // Of the norm. It is constant, so that this is allowed ahead of the wait.
  __device__ void load_weight() {
    const auto* const weight = static_cast<const BFloat16*>(a_.norm_weight.data);
    for (int i = threadIdx.x; i < packets_; i += F::kThreads) {
      copy_async(shared_address(weight_ + i * kPacket), weight + i * kPacket);
    }
    commit_copies();
  }

  __device__ void bring() {
#pragma unroll 1
    for (int i = threadIdx.x; i < static_cast<int>(a_.T) * packets_; i += F::kThreads) {
      const int token = i / packets_, first = i % packets_ * kPacket;
      copy_async(shared_address(row(token) + first), row_of<BFloat16>(a_.x, token, 0) + first);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
  }

  // Waits for the kernel before, too. Rows come to shared memory all at once, for registers are full of the weight. A
  // warp norms a token, or several norm one and take turns with its runs of 256 columns: where they are is found ahead
  // of the wait.
  __device__ void norm() {
    constexpr int kRun = 32 * kPacket;
    const bool has_residual = a_.residual.data != nullptr;
    const int D = static_cast<int>(a_.D), T = static_cast<int>(a_.T);
    int shift = 0;  // of the number of warps that norm a token
    while ((T << (shift + 1)) <= F::kWarps && (kRun << (shift + 1)) <= D) ++shift;
    const int warp = threadIdx.x / 32;
    const int first_token = warp >> shift, token_step = F::kWarps >> shift;
    const int first_column = (warp & ((1 << shift) - 1)) * kRun + threadIdx.x % 32 * kPacket;
    const int column_step = kRun << shift;
    wait_for_kernel_before();
    for (int token = first_token; token < T; token += token_step) {
#pragma unroll 4
      for (int i = first_column; i < D; i += column_step) {
        copy_async(shared_address(row(token) + i), row_of<BFloat16>(a_.x, token, 0) + i);
        if (has_residual) {
          copy_async(shared_address(residual_row(token) + i), row_of<BFloat16>(a_.residual, token, 0) + i);
        }
      }
    }
    commit_copies();
    wait_copies<0>();
    for (int token = first_token; token < T; token += token_step) {
#pragma unroll 4
      for (int i = first_column; i < D; i += column_step) {
        float x[kPacket];
        widen(row(token) + i, x);
        if (has_residual) {
          float residual[kPacket];
          widen(residual_row(token) + i, residual);
          add_residual<BFloat16>(residual, x);
          store_packet<true>(row(token), i, i + 1, x);  // for this thread alone
          if (blockIdx.x == 0) store_packet<true>(row_of<BFloat16>(a_.residual_out, token, 0), i, i + 1, x);
        }
        squares_[token * packets_ + i / kPacket] = sum_of_squares(x);
      }
    }
    __syncthreads();
    for (int token = first_token; token < T; token += token_step) {
      const float scale = norm_scale(sum_over_packets(squares_ + token * packets_, packets_), a_.D, a_.eps);
#pragma unroll 4
      for (int i = first_column; i < D; i += column_step) {
        float x[kPacket], weight[kPacket];
        widen(row(token) + i, x);
        widen(weight_ + i, weight);
        apply_norm(scale, weight, x);
        store_packet<true>(row(token), i, i + 1, x);
      }
    }
    __syncthreads();
  }

  __device__ BFloat16* row(int64_t token) const {
    return rows_ + token * row_stride(a_.D);
  }

 private:
  __device__ static void widen(const BFloat16* from, float (&x)[kPacket]) {
    RawPackets<BFloat16, kPacket> raw;
    raw.load(from);
    raw.widen(x);
  }
  __device__ BFloat16* residual_row(int token) const {
    return residual_ + token * packets_ * kPacket;
  }

  const LinearArgs& a_;
  int packets_;  // of a token
  BFloat16* rows_;
  BFloat16* weight_;
  BFloat16* residual_;
  float* squares_;
};

template <class F>
__global__ void __launch_bounds__(F::kThreads) __maxnreg__(F::kRegisters)
    linear_kernel(const __grid_constant__ LinearArgs a) {
  __shared__ float parts[F::kWarps][F::kTokens][F::kTiles * kTile + 1];
  extern __shared__ uint4 shared[];  // tokens
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row = lane / 4;         // of a fragment
  const int column = lane % 4 * 8;  // of a piece
  const int num_pieces = static_cast<int>(a.D / kPiece);

  const BFloat16* outputs[F::kTiles];
#pragma unroll
  for (int t = 0; t < F::kTiles; ++t) outputs[t] = weight_row<F>(a, t, row) + column;
  uint4 w[F::kPieces][F::kTiles];
  const auto load_weight = [&](int first) {
#pragma unroll
    for (int i = 0; i < F::kPieces; ++i) {
      const int piece = first + i * F::kWarps;
      if (piece >= num_pieces) break;
#pragma unroll
      for (int t = 0; t < F::kTiles; ++t) w[i][t] = load_packet(outputs[t] + piece * kPiece);
    }
  };

  let_next_kernel_launch();
  TokenRows<F> rows(a, shared);
  if constexpr (F::kNorms) rows.load_weight();
  const bool is_constant = F::kNorms || a.has_constant_weight;
  if (is_constant) load_weight(warp);
  if (!is_constant || num_pieces > F::kPieces * F::kWarps) prefetch_rows<F>(a);
  if constexpr (F::kNorms) {
    rows.norm();
  } else {
    wait_for_kernel_before();
    if (!is_constant) load_weight(warp);
    if constexpr (F::kIsStaged) rows.bring();
  }

  if constexpr (F::kIsStaged) {  // products with two tiles of outputs at once and a tile of tokens
#pragma unroll 1
    for (int first_token = 0; first_token < F::kTokens; first_token += kTile) {
      const BFloat16* const token = rows.row(min(static_cast<int64_t>(first_token + row), a.T - 1)) + column;
      constexpr int kPairs = (F::kTiles + 1) / 2;
      float sums[2][kPairs][4] = {};  // of first and of second halves
      for (int first = warp; first < num_pieces; first += F::kWarps * F::kPieces) {
        if (first != warp) load_weight(first);
#pragma unroll
        for (int i = 0; i < F::kPieces; ++i) {
          const int piece = first + i * F::kWarps;
          if (piece >= num_pieces) break;
          const uint4 x = *reinterpret_cast<const uint4*>(token + piece * kPiece);
#pragma unroll
          for (int p = 0; p < kPairs; ++p) {
            const uint4 low = w[i][2 * p];
            const uint4 high = F::kTiles == 1 ? uint4{} : w[i][(2 * p + 1) % F::kTiles];
            const uint32_t even[4] = {low.x, high.x, low.y, high.y};
            const uint32_t odd[4] = {low.z, high.z, low.w, high.w};
            multiply_bf16(sums[0][p], even, x.x, x.y);
            multiply_bf16(sums[1][p], odd, x.z, x.w);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < F::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int from = t % 2 * 2 + i;
          parts[warp][first_token + lane % 4 * 2 + i][t * kTile + row] = sums[0][t / 2][from] + sums[1][t / 2][from];
        }
      }
    }
  } else {
    constexpr int kTokenTiles = F::kTokens / kTile;
    constexpr int kTogether = F::kTokens == 16 ? 4 : 2;  // pieces of tokens
    const BFloat16* tokens[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const int64_t token = min(static_cast<int64_t>(t * kTile + row), a.T - 1);
      tokens[t] = row_of<BFloat16>(a.x, token, 0) + column;
    }
    constexpr int kProducts = kTokenTiles / 2;    // of a tile of outputs: 16 tokens each
    float sums[2][kProducts][F::kTiles][4] = {};  // of first and of second halves
    for (int first = warp; first < num_pieces; first += F::kWarps * F::kPieces) {
      if (first != warp) load_weight(first);
#pragma unroll
      for (int begin = 0; begin < F::kPieces; begin += kTogether) {
        uint4 x[kTogether][kTokenTiles];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int piece = first + (begin + i) * F::kWarps;
          if (piece >= num_pieces) break;
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            x[i][t] = *reinterpret_cast<const uint4*>(tokens[t] + piece * kPiece);
          }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + (begin + i) * F::kWarps >= num_pieces) break;
#pragma unroll
          for (int p = 0; p < kProducts; ++p) {
            const uint4 low = x[i][2 * p];
            const uint4 high = x[i][2 * p + 1];
            const uint32_t even[4] = {low.x, high.x, low.y, high.y};
            const uint32_t odd[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int t = 0; t < F::kTiles; ++t) {
              const uint4 packet = w[begin + i][t];
              multiply_bf16(sums[0][p][t], even, packet.x, packet.y);
              multiply_bf16(sums[1][p][t], odd, packet.z, packet.w);
            }
          }
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
#pragma unroll
      for (int t = 0; t < F::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = p * 2 * kTile + row + i / 2 * kTile;
          parts[warp][token][t * kTile + lane % 4 * 2 + i % 2] = sums[0][p][t][i] + sums[1][p][t][i];
        }
      }
    }
  }
  __syncthreads();
  const auto sum_of = [&](int token, int tile, int i) {
    float sum = a.bias.data == nullptr ? 0.0f : load_scalar(a.bias.dtype, a.bias.data, output_of<F>(a, tile, i));
#pragma unroll
    for (int other = 0; other < F::kWarps; ++other) sum += parts[other][token][tile * kTile + i];
    return sum;
  };
  for (int i = threadIdx.x; i < F::kTokens * F::kResults; i += F::kThreads) {
    const int token = i / F::kResults;
    const int result = i % F::kResults;
    const int64_t place = static_cast<int64_t>(blockIdx.x) * F::kResults + result;
    if (token >= a.T || place >= (F::kGates ? a.O / 2 : a.O)) continue;
    float out;
    if constexpr (F::kGates) {
      const float gate = rounded<BFloat16>(sum_of(token, result / kTile, result % kTile));
      out = rounded<BFloat16>(sum_of(token, F::kResultTiles + result / kTile, result % kTile)) * silu(gate);
    } else {
      out = sum_of(token, result / kTile, result % kTile);
    }
    store_scalar(a.out.dtype, row_of(a.out, token, 0), place, out);
  }
}

template <class F>
void launch(const LinearArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(F::kGates ? args.O / 2 : args.O, F::kResults)));
  const int64_t bytes = F::kIsStaged ? TokenRows<F>::shared_bytes(args) : 0;
  launch_overlapping(linear_kernel<F>, grid, F::kThreads, static_cast<size_t>(bytes), /*cluster=*/1, stream, args);
}

// With long rows more warps, so that few outputs too have enough bytes on their way; their blocks have `kTiles` tiles.
template <int kTokens, int kTiles, int kTilesOfFewWarps, bool kNorms, bool kGates>
void launch_warps(const LinearArgs& args, cudaStream_t stream) {
  if (args.D > kMostOfFewClasses) {
    launch<Form<kTokens, kTiles, kManyClasses, kNorms, kGates>>(args, stream);
  } else {
    launch<Form<kTokens, kTilesOfFewWarps, kFewClasses, kNorms, kGates>>(args, stream);
  }
}

// Blocks of 8 outputs where blocks of 16 would leave multiprocessors idle. Every block brings all tokens, so with
// several of them blocks have 32 outputs where there are enough: of few tokens so many that blocks run in turns, which
// hides what bringing them takes; of more tokens, whose blocks leave little room to others, one or two for a
// multiprocessor.
template <int kTokens>
void launch_plain(const LinearArgs& args, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.O, 4 * kTile);
  const bool run_at_once = blocks <= 2 * num_multiprocessors();
  const bool are_wide =
      kTokens == kFewTokens ? args.T > 1 && !run_at_once : run_at_once && blocks >= num_multiprocessors();
  if (are_wide && args.D <= kMostOfFewClasses) {
    return args.silu_and_mul ? launch<Form<kTokens, 4, kFewClasses, false, true>>(args, stream)
                             : launch<Form<kTokens, 4, kFewClasses, false, false>>(args, stream);
  }
  if (args.silu_and_mul) return launch_warps<kTokens, 2, 2, false, true>(args, stream);
  if (ceil_div(args.O, 2 * kTile) < num_multiprocessors()) {
    launch_warps<kTokens, 1, 1, false, false>(args, stream);
  } else {
    launch_warps<kTokens, 2, 2, false, false>(args, stream);
  }
}

// Larger blocks, of which two have a multiprocessor with registers to spare: the next kernel's blocks begin beside
// them, and fewer of them norm the tokens.
template <bool kGates>
void launch_normed(const LinearArgs& args, cudaStream_t stream) {
  launch_warps<kFewTokens, 2, 4, true, kGates>(args, stream);
}

bool supports_norm(const LinearArgs& args) {
  return args.O > 0 && args.T <= kFewTokens && args.T * args.D <= kMostNormed && args.D % (32 * kPacket) == 0 &&
         args.norm_weight.dtype == DType::kBFloat16 && reinterpret_cast<uintptr_t>(args.norm_weight.data) % 16 == 0 &&
         (args.residual.data == nullptr || (is_aligned(args.residual) && is_aligned(args.residual_out)));
}

}  // namespace

bool linear_supports(const LinearArgs& args) {
  return args.T <= kMostTokens && args.x.dtype == DType::kBFloat16 && args.D % kPiece == 0 && args.D > 0 &&
         is_aligned(args.x) && reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.weight_stride % 8 == 0 &&
         (args.norm_weight.data == nullptr || supports_norm(args));
}

void linear(const LinearArgs& args, cudaStream_t stream) {
  if (args.T == 0 || args.O == 0) return;
  if (linear_has_many(args)) {
    linear_of_many(args, stream);
  } else if (args.norm_weight.data != nullptr) {
    args.silu_and_mul ? launch_normed<true>(args, stream) : launch_normed<false>(args, stream);
  } else if (args.T <= kFewTokens && args.T * args.D <= kMostStaged) {
    launch_plain<kFewTokens>(args, stream);
  } else if (args.T <= 16) {
    launch_plain<16>(args, stream);
  } else {
    launch_plain<kMostTokens>(args, stream);
  }
  check_launch("linear");
}

}  // namespace xgdn::kernel::cuda
