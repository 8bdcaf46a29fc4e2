// SPDX-License-Identifier: Apache-2.0
// What the chunks of chunk_gated_delta_rule need of keys, queries and gates alone (ChunkFactors), all chunks at once:
// a block takes a chunk and a key head with its value heads, two of these at a time.
//
// The inverse X of the unit triangular matrix I + A, in blocks of 16 x 16: those of the diagonal by substitution in
// f32, a column to a lane; below them, X_ij = -X_ii sum_{j <= m < i} A_im X_mj, where a column of blocks needs nothing
// of the others. Products there are tf32 with f32 sums; a warp keeps the X_mj^T of a column in registers, as left
// operands of X_ij^T = -(sum X_mj^T A_im^T) X_ii^T.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kFactorThreads = 128;
inline constexpr int kSquarePitch = 72;  // floats; rows 8 banks apart
inline constexpr int kHeadsAtOnce = 2;

using FactorSquare = float[kChunk * kSquarePitch];

/// Of a value head: its gates.
struct FactorGates {
  float sum_high[kChunk];  // b = cumsum g in two parts
  float sum_low[kChunk];
  float beta[kChunk];
};

/// Shared memory of a block. The squares take the place of the tiles when these have been multiplied.
template <int kK>
struct FactorMemory {
  static constexpr int kTileBytes = kK / 64 * kPanelBytes;
  union alignas(1024) {
    char tiles[2][kTileBytes];  // k and q
    FactorSquare squares[kHeadsAtOnce];
  };
  float k_factor[kChunk];
  float q_factor[kChunk];
  FactorGates gates[kHeadsAtOnce];
};

/// Starts to copy rows [token, token + count) to a tile, with zeros behind them.
template <int kK>
__device__ inline void start_tile(const InRows& rows, bool is_aligned, int64_t token, int count, int64_t head,
                                  char* tile) {
  constexpr int kPieces = kK / 8;  // of a row
  constexpr int kStep = kFactorThreads / kPieces;
  static_assert(kStep % 8 == 0);  // so that a thread's pieces lie at the same place of their rows
  const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  if (rows.dtype == DType::kBFloat16 && is_aligned) {
    const char* from = row_of(rows, token + first, head) + piece * kPieceBytes;
    const int64_t step = rows.token_stride * 2 * kStep;
    const uint32_t to = shared_address(tile) + piece_offset(first, piece);
#pragma unroll
    for (int i = 0; i < kChunk / kStep; ++i, from += step) {
      const bool is_zero = first + i * kStep >= count;
      copy_async(to + i * kStep * 128, is_zero ? rows.data : from, is_zero);
    }
  } else {
#pragma unroll 1
    for (int row = first; row < kChunk; row += kStep) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < count) x = load_piece(rows.dtype, is_aligned, row_of(rows, token + row, head), piece * 8);
      *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = x;
    }
  }
}

/// g and beta of a lane's two tokens on their way.
class RawChunkGates {
 public:
  __device__ void load(const ChunkGatedDeltaRuleArgs& a, int64_t token, int count, int64_t head) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * static_cast<int>(threadIdx.x % 32) + i;
      if (row >= count) continue;
      g_[i].load(a.g.dtype, row_of(a.g, token + row, head), 0);
      beta_[i].load(a.beta.dtype, row_of(a.beta, token + row, head), 0);
    }
  }

  /// b, summed in f64 because only differences matter, and ChunkGates. A warp together.
  template <int kK>
  __device__ void sum(const ChunkGatedDeltaRuleArgs& a, int count, const FactorMemory<kK>& memory, FactorGates& gates,
                      ChunkGates& to) const {
    const int lane = threadIdx.x % 32;
    double g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is_token = 2 * lane + i < count;
      g[i] = is_token ? g_[i].widened(a.g.dtype) : 0.0f;
      gates.beta[2 * lane + i] = is_token ? beta_[i].widened(a.beta.dtype) : 0.0f;
    }
    double b = g[0] + g[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double before = __shfl_up_sync(kFullWarp, b, step);
      if (lane >= step) b += before;
    }
    const double total = __shfl_sync(kFullWarp, b, 31);
    if (lane == 0) {
      to.last = expf(static_cast<float>(total));
      for (float& x : to.unused) x = 0.0f;  // copies take them along
    }
    b -= g[0] + g[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * lane + i;
      const bool is_token = row < count;
      b += g[i];
      const float high = static_cast<float>(b);
      gates.sum_high[row] = high;
      gates.sum_low[row] = static_cast<float>(b - high);
      const float decay = expf(high);
      const float rest = expf(fminf(static_cast<float>(total - b), 0.0f));
      to.read[row] = is_token ? decay * memory.k_factor[row] : 0.0f;
      to.write[row] = is_token ? rest * memory.k_factor[row] : 0.0f;
      to.out[row] = is_token ? a.scale * decay * memory.q_factor[row] : 0.0f;
    }
  }

 private:
  RawScalar g_[2], beta_[2];
};

/// The factor that makes a row of this sum of squares a unit vector.
__device__ inline float norm_factor(float sum) {
  return 1.0f / sqrtf(sum + kNormEps);
}

/// K K^T and Q K^T, rows 16 warp to 16 warp + 15, up to the diagonal block. The diagonals of K K^T and Q Q^T are the
/// sums of squares of the factors of these rows.
template <int kK>
__device__ inline void multiply_keys(FactorMemory<kK>& memory, bool normalises, int warp, float (&kk)[4][2][4],
                                     float (&qk)[4][2][4]) {
  const int lane = threadIdx.x % 32;
  const uint32_t k_tile = shared_address(memory.tiles[0]), q_tile = shared_address(memory.tiles[1]);
  float qq[2][4] = {};
#pragma unroll
  for (int block = 0; block < 4; ++block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) kk[block][i / 4][i % 4] = qk[block][i / 4][i % 4] = 0.0f;
  }
#pragma unroll 2
  for (int step = 0; step < kK / 16; ++step) {
    uint32_t k_rows[4], q_rows[4], x[4];
    const uint32_t offset = piece_offset(warp * 16 + lane % 16, 2 * step + lane / 16);
    const int row = lane / 16 * 8 + lane % 8, piece = 2 * step + lane / 8 % 2;
    load_matrices(k_tile + offset, k_rows);
    load_matrices(q_tile + offset, q_rows);
    load_matrices(q_tile + piece_offset(warp * 16 + row, piece), x);
    multiply_bf16(qq[0], q_rows, x[0], x[1]);
    multiply_bf16(qq[1], q_rows, x[2], x[3]);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      if (block > warp) continue;
      load_matrices(k_tile + piece_offset(block * 16 + row, piece), x);
      multiply_bf16(kk[block][0], k_rows, x[0], x[1]);
      multiply_bf16(kk[block][1], k_rows, x[2], x[3]);
      multiply_bf16(qk[block][0], q_rows, x[0], x[1]);
      multiply_bf16(qk[block][1], q_rows, x[2], x[3]);
    }
  }
  const int g = lane / 4;
  if (lane % 4 != g / 2) return;  // who has (g, g) and (g + 8, g + 8)
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if (block != warp) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float k_square = g % 2 == 0 ? kk[block][half][2 * half] : kk[block][half][2 * half + 1];
      const float q_square = g % 2 == 0 ? qq[half][2 * half] : qq[half][2 * half + 1];
      memory.k_factor[warp * 16 + half * 8 + g] = normalises ? norm_factor(k_square) : 1.0f;
      memory.q_factor[warp * 16 + half * 8 + g] = normalises ? norm_factor(q_square) : 1.0f;
    }
  }
}

/// This warp's rows of A to `square`, and of the scores to memory. Left of the diagonal block, whose first row is r,
/// D_ij = exp(b_i - b_r) exp(b_r - b_j).
template <int kK>
__device__ inline void apply_gates(const FactorMemory<kK>& memory, const FactorGates& gates, float scale, int warp,
                                   const float (&kk)[4][2][4], const float (&qk)[4][2][4], FactorSquare& square,
                                   ChunkSquare& scores) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const float high_r = gates.sum_high[warp * 16], low_r = gates.sum_low[warp * 16];
  float high[2], low[2], key[2], query[2], far_key[2], far_query[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + g + 8 * i;
    high[i] = gates.sum_high[row];
    low[i] = gates.sum_low[row];
    key[i] = gates.beta[row] * memory.k_factor[row];
    query[i] = scale * memory.q_factor[row];
    const float decay = __expf(high[i] - high_r + (low[i] - low_r));
    far_key[i] = key[i] * decay;
    far_query[i] = query[i] * decay;
  }
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if (block > warp) continue;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = block * 16 + tile * 8 + 2 * t;
      const float2 high_j = *reinterpret_cast<const float2*>(&gates.sum_high[column]);
      const float2 low_j = *reinterpret_cast<const float2*>(&gates.sum_low[column]);
      const float2 factor_j = *reinterpret_cast<const float2*>(&memory.k_factor[column]);
      uint4* rows = scores.rows[ChunkSquare::block_of(warp * 2, column / 8)];
      float* to = square + (warp * 16 + g) * kSquarePitch + column;
      float2 a[2];
      uint32_t p[2];
      if (block < warp) {
        const float d0 = __expf(high_r - high_j.x + (low_r - low_j.x)) * factor_j.x;
        const float d1 = __expf(high_r - high_j.y + (low_r - low_j.y)) * factor_j.y;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i].x = far_key[i] * (d0 * kk[block][tile][2 * i]);
          a[i].y = far_key[i] * (d1 * kk[block][tile][2 * i + 1]);
          p[i] =
              pack_bf16(far_query[i] * (d0 * qk[block][tile][2 * i]), far_query[i] * (d1 * qk[block][tile][2 * i + 1]));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = warp * 16 + g + 8 * i;
          // Above the diagonal the difference may be positive, and its exponential infinite.
          const float d0 = __expf(fminf(high[i] - high_j.x + (low[i] - low_j.x), 0.0f)) * factor_j.x;
          const float d1 = __expf(fminf(high[i] - high_j.y + (low[i] - low_j.y), 0.0f)) * factor_j.y;
          a[i].x = column < row ? key[i] * d0 * kk[block][tile][2 * i] : 0.0f;
          a[i].y = column + 1 < row ? key[i] * d1 * kk[block][tile][2 * i + 1] : 0.0f;
          p[i] = pack_bf16(column <= row ? query[i] * d0 * qk[block][tile][2 * i] : 0.0f,
                           column + 1 <= row ? query[i] * d1 * qk[block][tile][2 * i + 1] : 0.0f);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float2*>(to + 8 * i * kSquarePitch) = a[i];
        reinterpret_cast<uint32_t*>(rows + 16 * i + g)[t] = p[i];  // 8 rows on: two blocks on
      }
    }
  }
}

/// A block's 16 columns times beta, a row to a lane, as bf16 to memory.
__device__ inline void store_diagonal(const float* row, const float* beta, int place, ChunkSquare& inverse) {
  const int i = place * 16 + static_cast<int>(threadIdx.x % 16);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + half * 8 + j);
      const float4 b = *reinterpret_cast<const float4*>(beta + place * 16 + half * 8 + j);
      x[j] = four.x * b.x, x[j + 1] = four.y * b.y, x[j + 2] = four.z * b.z, x[j + 3] = four.w * b.w;
    }
    inverse.rows[ChunkSquare::block_of(i / 8, place * 2 + half)][i % 8] =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
}

/// The inverse of I + A on a diagonal block, in place: a lane takes a column, 16 lanes a block.
__device__ inline void invert_diagonal(float* block) {
  const int column = threadIdx.x % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int j = 0; j < 16; j += 2) {
    float2 a[16];
#pragma unroll
    for (int i = j + 1; i < 16; ++i) a[i] = *reinterpret_cast<const float2*>(block + i * kSquarePitch + j);
#pragma unroll
    for (int i = j + 1; i < 16; ++i) x[i] = fmaf(-a[i].x, x[j], x[i]);
#pragma unroll
    for (int i = j + 2; i < 16; ++i) x[i] = fmaf(-a[i].y, x[j + 1], x[i]);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; ++i) block[i * kSquarePitch + column] = x[i];
  __syncwarp();
}

__device__ inline float* square_block(FactorSquare& square, int i, int j) {
  return square + i * 16 * kSquarePitch + j * 16;
}

/// sum [16, 16] += x b^T, with x the left operands of a block and b a block of a square.
__device__ inline void multiply_block(float (&sum)[2][4], const uint32_t (&x)[2][4], const float* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const float2 pair =
          *reinterpret_cast<const float2*>(b + (tile * 8 + lane / 4) * kSquarePitch + step * 8 + lane % 4 * 2);
      multiply_tf32(sum[tile], x[step], round_tf32(pair.x), round_tf32(pair.y));
    }
  }
}

/// Sums as left operands; the product's depth runs over columns 0, 2, 4, 6, 1, 3, 5, 7 of each 8.
__device__ inline void round_block(const float (&sum)[2][4], float sign, uint32_t (&x)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    x[tile][0] = round_tf32(sign * sum[tile][0]);
    x[tile][1] = round_tf32(sign * sum[tile][2]);
    x[tile][2] = round_tf32(sign * sum[tile][1]);
    x[tile][3] = round_tf32(sign * sum[tile][3]);
  }
}

/// Blocks below the diagonal in column kJ of the inverse, from inverted diagonal blocks, times beta to memory.
template <int kJ>
__device__ inline void invert_column(FactorSquare& square, const float* beta, ChunkSquare& inverse) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const float betas[2] = {beta[kJ * 16 + g], beta[kJ * 16 + g + 8]};
  uint32_t x[4][2][4];  // X_mj^T
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const float* rows = square_block(square, kJ, kJ) + (step * 8 + 2 * t) * kSquarePitch + g;
    x[kJ][step][0] = round_tf32(rows[0]);
    x[kJ][step][1] = round_tf32(rows[8]);
    x[kJ][step][2] = round_tf32(rows[kSquarePitch]);
    x[kJ][step][3] = round_tf32(rows[kSquarePitch + 8]);
  }
#pragma unroll
  for (int i = kJ + 1; i < 4; ++i) {
    float sum[2][4] = {};
#pragma unroll
    for (int m = kJ; m < i; ++m) multiply_block(sum, x[m], square_block(square, i, m));
    uint32_t y[2][4];
    round_block(sum, -1.0f, y);
    float result[2][4] = {};
    multiply_block(result, y, square_block(square, i, i));
    round_block(result, 1.0f, x[i]);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = pack_bf16(result[tile][2 * half] * betas[half], result[tile][2 * half + 1] * betas[half]);
        uint4* rows = inverse.rows[ChunkSquare::block_of(2 * i + tile, 2 * kJ + half)];
        reinterpret_cast<uint32_t*>(rows + g)[t] = transpose_matrix(pair);
      }
    }
  }
}

struct FactorsKernel {
  ChunkGatedDeltaRuleArgs args;
  ChunkFactors* factors;  // [M, HV]
  bool is_q_aligned, is_k_aligned;
};

template <int kK>
__global__ void __launch_bounds__(kFactorThreads, 4)
    chunk_factors_kernel(const __grid_constant__ FactorsKernel kernel) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<FactorMemory<kK>*>(shared_memory);
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  let_next_kernel_launch();
  const int64_t chunk = blockIdx.x / a.H;
  const int64_t key_head = blockIdx.x % a.H;
  const int n = a.chunk_indices[2 * chunk];
  if (n < 0 || a.state.read[n] < 0) return;
  const int64_t token = a.cu_seqlens[n] + static_cast<int64_t>(a.chunk_indices[2 * chunk + 1]) * kChunk;
  const int64_t rest = a.ends[n] - token;
  const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
  const int warp = threadIdx.x / 32;
  const int half = threadIdx.x / 16 % 2;
  const int heads = static_cast<int>(a.HV / a.H);

  start_tile<kK>(a.k, kernel.is_k_aligned, token, count, key_head, memory.tiles[0]);
  start_tile<kK>(a.q, kernel.is_q_aligned, token, count, key_head, memory.tiles[1]);
  commit_copies();
  RawChunkGates gates;  // of a pair's head to each of the first warps
  if (warp < kHeadsAtOnce && warp < heads) gates.load(a, token, count, key_head * heads + warp);
  wait_copies<0>();
  __syncthreads();
  float kk[4][2][4], qk[4][2][4];
  multiply_keys<kK>(memory, a.normalise_qk, warp, kk, qk);

  for (int first = 0; first < heads; first += kHeadsAtOnce) {
    const int num_heads = heads - first < kHeadsAtOnce ? heads - first : kHeadsAtOnce;
    const int64_t head = key_head * heads + first;
    ChunkFactors* const factors = kernel.factors + chunk * a.HV + head;
    __syncthreads();
    if (warp < num_heads) {
      gates.sum(a, count, memory, memory.gates[warp], factors[warp].gates);
      if (first + kHeadsAtOnce + warp < heads) gates.load(a, token, count, head + kHeadsAtOnce + warp);
    }
    __syncthreads();
    for (int i = 0; i < num_heads; ++i) {
      apply_gates<kK>(memory, memory.gates[i], a.scale, warp, kk, qk, memory.squares[i], factors[i].scores);
    }
    __syncwarp();
    // A half of the warp takes a head's diagonal block; the second idles along where there is one head.
    float* diagonal = square_block(memory.squares[half], warp, warp);
    invert_diagonal(diagonal);
    if (half < num_heads) {
      store_diagonal(diagonal + threadIdx.x % 16 * kSquarePitch, memory.gates[half].beta, warp, factors[half].inverse);
    }
    __syncthreads();
    const int i = warp % 2;
    if (i < num_heads) {
      FactorSquare& square = memory.squares[i];
      ChunkSquare& inverse = factors[i].inverse;
      if (warp < 2) {
        invert_column<0>(square, memory.gates[i].beta, inverse);
      } else {
        invert_column<1>(square, memory.gates[i].beta, inverse);
        invert_column<2>(square, memory.gates[i].beta, inverse);
      }
    }
  }
}

}  // namespace xgdn::kernel::cuda
