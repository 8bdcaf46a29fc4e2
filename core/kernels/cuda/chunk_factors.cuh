// SPDX-License-Identifier: Apache-2.0
// What the chunks of chunk_gated_delta_rule need of keys, queries and gates alone (ChunkFactors), all chunks at once:
// a block takes a chunk and a key head with its value heads.
//
// The inverse X of the unit triangular matrix I + A, in blocks of 16 x 16: those of the diagonal by substitution in
// f32; below them, X_ij = -X_ii sum_{j <= m < i} A_im X_mj, a column of blocks to a warp. Products there are tf32 with
// f32 sums; a warp keeps the X_mj^T of its column in registers, as left operands of X_ij^T = -(sum X_mj^T A_im^T)
// X_ii^T.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kFactorThreads = 128;
inline constexpr int kSquarePitch = 72;  // floats; rows 8 banks apart
inline constexpr int kHeadsAtOnce = 4;   // whose gates are summed together, one to a warp

/// Shared memory of a block. The square takes the place of the tiles when these have been multiplied.
template <int kK>
struct FactorMemory {
  static constexpr int kTileBytes = kK / 64 * kPanelBytes;
  static constexpr int kSquareBytes = kChunk * kSquarePitch * sizeof(float);
  static constexpr int kUnionBytes = 2 * kTileBytes > kSquareBytes ? 2 * kTileBytes : kSquareBytes;

  alignas(1024) char tiles[kUnionBytes];
  float k_factor[kChunk];
  float q_factor[kChunk];
  float sum_high[kHeadsAtOnce][kChunk];  // of the logarithms to base 2 of the decays, in two parts
  float sum_low[kHeadsAtOnce][kChunk];
  float beta[kHeadsAtOnce][kChunk];
};

/// Rows of `rows` at [token, token + count) to a tile, zeros behind them, and the factors that make them unit vectors.
template <int kK>
__device__ inline void load_tile(const InRows& rows, bool is_aligned, bool normalises, int64_t token, int count,
                                 int64_t head, char* tile, float* factors) {
  constexpr int kLanes = kK / 8;  // of a row
  constexpr int kRowsAtOnce = kFactorThreads / kLanes;
  constexpr int kSteps = kChunk / kRowsAtOnce;
  const int piece = threadIdx.x % kLanes;
  const int first = threadIdx.x / kLanes;
  uint4 x[kSteps];
  if (rows.dtype == DType::kBFloat16 && is_aligned) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int row = first + i * kRowsAtOnce;
      x[i] =
          row < count ? reinterpret_cast<const uint4*>(row_of(rows, token + row, head))[piece] : make_uint4(0, 0, 0, 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      const int row = first + i * kRowsAtOnce;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      const uint4 y =
          row < count ? load_piece(rows.dtype, is_aligned, row_of(rows, token + row, head), piece * 8) : zero;
      *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = y;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      x[i] = *reinterpret_cast<const uint4*>(tile + piece_offset(first + i * kRowsAtOnce, piece));
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int row = first + i * kRowsAtOnce;
    *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = x[i];
    if (!normalises) {
      if (piece == 0) factors[row] = 1.0f;
      continue;
    }
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&x[i]);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = __bfloat1622float2(pairs[j]);
      sum = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum));
    }
    sum = sum_over_lanes<kLanes>(sum);
    if (piece == 0) factors[row] = 1.0f / sqrtf(sum + kNormEps);
  }
}

/// b = cumsum g of a value head, summed in f64 because only differences matter; beta; ChunkGates. One warp.
template <int kK>
__device__ inline void load_gates(const ChunkGatedDeltaRuleArgs& a, int64_t token, int count, int64_t head,
                                  FactorMemory<kK>& memory, int place, ChunkGates& gates) {
  constexpr double kLog2E = 1.4426950408889634;
  const int lane = threadIdx.x % 32;
  double sum[2] = {0.0, 0.0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane + i;
    float beta = 0.0f;
    if (row < count) {
      sum[i] = kLog2E * load_scalar(a.g.dtype, row_of(a.g, token + row, head), 0);
      beta = load_scalar(a.beta.dtype, row_of(a.beta, token + row, head), 0);
    }
    memory.beta[place][row] = beta;
  }
  double before = sum[0] + sum[1];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(kFullWarp, before, step);
    if (lane >= step) before += other;
  }
  const double total = __shfl_sync(kFullWarp, before, 31);
  before -= sum[0] + sum[1];
  if (lane == 0) gates.last = exp2f(static_cast<float>(total));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * lane + i;
    before += sum[i];
    const float high = static_cast<float>(before);
    memory.sum_high[place][row] = high;
    memory.sum_low[place][row] = static_cast<float>(before - high);
    const bool is_token = row < count;
    const float decay = exp2f(high);
    gates.read[row] = is_token ? decay * memory.k_factor[row] : 0.0f;
    gates.write[row] = is_token ? exp2f(fminf(static_cast<float>(total - before), 0.0f)) * memory.k_factor[row] : 0.0f;
    gates.out[row] = is_token ? a.scale * decay * memory.q_factor[row] : 0.0f;
  }
}

/// K K^T and Q K^T, rows 16 warp to 16 warp + 15, up to the diagonal block.
template <int kK>
__device__ inline void multiply_keys(uint32_t k_tile, uint32_t q_tile, int warp, float (&kk)[4][2][4],
                                     float (&qk)[4][2][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
#pragma unroll
    for (int i = 0; i < 8; ++i) kk[block][i / 4][i % 4] = qk[block][i / 4][i % 4] = 0.0f;
  }
#pragma unroll 2
  for (int step = 0; step < kK / 16; ++step) {
    uint32_t k_rows[4], q_rows[4];
    const uint32_t offset = piece_offset(warp * 16 + lane % 16, 2 * step + lane / 16);
    load_matrices(k_tile + offset, k_rows);
    load_matrices(q_tile + offset, q_rows);
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      if (block > warp) continue;
      uint32_t x[4];
      load_matrices(k_tile + piece_offset(block * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2), x);
      multiply_bf16(kk[block][0], k_rows, x[0], x[1]);
      multiply_bf16(kk[block][1], k_rows, x[2], x[3]);
      multiply_bf16(qk[block][0], q_rows, x[0], x[1]);
      multiply_bf16(qk[block][1], q_rows, x[2], x[3]);
    }
  }
}

/// This warp's rows of A to `square`, and of the scores to memory.
template <int kK>
__device__ inline void apply_gates(const FactorMemory<kK>& memory, int place, float scale, int warp,
                                   const float (&kk)[4][2][4], const float (&qk)[4][2][4], float* square,
                                   ChunkSquare& scores) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  float high[2], low[2], key[2], query[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + g + 8 * i;
    high[i] = memory.sum_high[place][row];
    low[i] = memory.sum_low[place][row];
    key[i] = memory.beta[place][row] * memory.k_factor[row];
    query[i] = scale * memory.q_factor[row];
  }
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    if (block > warp) continue;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = block * 16 + tile * 8 + 2 * t;
      const float2 high_j = *reinterpret_cast<const float2*>(&memory.sum_high[place][column]);
      const float2 low_j = *reinterpret_cast<const float2*>(&memory.sum_low[place][column]);
      const float2 factor_j = *reinterpret_cast<const float2*>(&memory.k_factor[column]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp * 16 + g + 8 * i;
        // Above the diagonal the difference may be positive, and its exponential infinite.
        const float d0 = exp2f(fminf(high[i] - high_j.x + (low[i] - low_j.x), 0.0f)) * factor_j.x;
        const float d1 = exp2f(fminf(high[i] - high_j.y + (low[i] - low_j.y), 0.0f)) * factor_j.y;
        const float a0 = column < row ? key[i] * d0 * kk[block][tile][2 * i] : 0.0f;
        const float a1 = column + 1 < row ? key[i] * d1 * kk[block][tile][2 * i + 1] : 0.0f;
        *reinterpret_cast<float2*>(square + row * kSquarePitch + column) = make_float2(a0, a1);
        const float p0 = column <= row ? query[i] * d0 * qk[block][tile][2 * i] : 0.0f;
        const float p1 = column + 1 <= row ? query[i] * d1 * qk[block][tile][2 * i + 1] : 0.0f;
        reinterpret_cast<uint32_t*>(&scores.pieces[row / 8][column / 8][row % 8])[t] = pack_bf16(p0, p1);
      }
    }
  }
}

/// The inverse of I + A on this warp's diagonal block, in place: a lane takes a column.
__device__ inline void invert_diagonal(float* block) {
  const int lane = threadIdx.x % 32;
  const int column = lane % 16;
  float x[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float sum = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      const float4 a = *reinterpret_cast<const float4*>(block + i * kSquarePitch + j);
      sum = fmaf(-a.x, x[j], sum);
      if (j + 1 < i) sum = fmaf(-a.y, x[j + 1], sum);
      if (j + 2 < i) sum = fmaf(-a.z, x[j + 2], sum);
      if (j + 3 < i) sum = fmaf(-a.w, x[j + 3], sum);
    }
    x[i] = sum;
  }
  __syncwarp();
  if (lane < 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) block[i * kSquarePitch + column] = x[i];
  }
}

/// sum [16, 16] += x b^T, with x the left operands of a block and b a block of the square.
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

/// Blocks below the diagonal in column j of the inverse, from inverted diagonal blocks. X_ij^T goes where A has its
/// block (j, i), above the diagonal.
__device__ inline void invert_column(float* square, int j) {
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const auto block = [&](int i, int m) { return square + i * 16 * kSquarePitch + m * 16; };
  uint32_t x[4][2][4];  // X_mj^T
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i != j) continue;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const float* rows = block(i, i) + (step * 8 + 2 * t) * kSquarePitch + g;
      x[i][step][0] = round_tf32(rows[0]);
      x[i][step][1] = round_tf32(rows[8]);
      x[i][step][2] = round_tf32(rows[kSquarePitch]);
      x[i][step][3] = round_tf32(rows[kSquarePitch + 8]);
    }
  }
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (i <= j) continue;
    float sum[2][4] = {};
#pragma unroll
    for (int m = 0; m < i; ++m) {
      if (m >= j) multiply_block(sum, x[m], block(i, m));
    }
    uint32_t y[2][4];
    round_block(sum, -1.0f, y);
    float result[2][4] = {};
    multiply_block(result, y, block(i, i));
    round_block(result, 1.0f, x[i]);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float* to = block(j, i) + g * kSquarePitch + tile * 8 + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(result[tile][0], result[tile][1]);
      *reinterpret_cast<float2*>(to + 8 * kSquarePitch) = make_float2(result[tile][2], result[tile][3]);
    }
  }
}

/// The inverse with its columns times beta.
__device__ inline void store_inverse(const float* square, const float* beta, ChunkSquare& inverse) {
  for (int index = threadIdx.x; index < kChunk * kChunk / 8; index += kFactorThreads) {
    const int row = index / kChunk * 8 + index % 8;
    const int piece = index / 8 % 8;
    if (!ChunkSquare::has(row, piece)) continue;
    const bool is_diagonal = piece / 2 == row / 16;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = piece * 8 + i;
      x[i] = beta[column] * square[is_diagonal ? row * kSquarePitch + column : column * kSquarePitch + row];
    }
    inverse.pieces[row / 8][piece][row % 8] =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
}

struct FactorsKernel {
  ChunkGatedDeltaRuleArgs args;
  ChunkFactors factors;
  bool is_q_aligned, is_k_aligned;
};

template <int kK>
__global__ void __launch_bounds__(kFactorThreads) chunk_factors_kernel(const __grid_constant__ FactorsKernel kernel) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& memory = *reinterpret_cast<FactorMemory<kK>*>(shared_memory);
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const int64_t chunk = blockIdx.x / a.H;
  const int64_t key_head = blockIdx.x % a.H;
  const int n = a.chunk_indices[2 * chunk];
  if (n < 0 || a.state.read[n] < 0) return;
  const int64_t token = a.cu_seqlens[n] + static_cast<int64_t>(a.chunk_indices[2 * chunk + 1]) * kChunk;
  const int64_t rest = a.cu_seqlens[n + 1] - token;
  const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
  const int warp = threadIdx.x / 32;

  char* k_tile = memory.tiles;
  char* q_tile = memory.tiles + FactorMemory<kK>::kTileBytes;
  load_tile<kK>(a.k, kernel.is_k_aligned, a.normalise_qk, token, count, key_head, k_tile, memory.k_factor);
  load_tile<kK>(a.q, kernel.is_q_aligned, a.normalise_qk, token, count, key_head, q_tile, memory.q_factor);
  __syncthreads();
  float kk[4][2][4], qk[4][2][4];
  multiply_keys<kK>(shared_address(k_tile), shared_address(q_tile), warp, kk, qk);

  float* square = reinterpret_cast<float*>(memory.tiles);
  const int64_t heads = a.HV / a.H;
  for (int64_t first = 0; first < heads; first += kHeadsAtOnce) {
    __syncthreads();
    const int64_t head = key_head * heads + first;
    const int num_heads = heads - first < kHeadsAtOnce ? static_cast<int>(heads - first) : kHeadsAtOnce;
    if (warp < num_heads) {
      load_gates<kK>(a, token, count, head + warp, memory, warp, kernel.factors.gates[chunk * a.HV + head + warp]);
    }
    for (int i = 0; i < num_heads; ++i) {
      const int64_t index = chunk * a.HV + head + i;
      __syncthreads();
      apply_gates<kK>(memory, i, a.scale, warp, kk, qk, square, kernel.factors.scores[index]);
      __syncwarp();
      invert_diagonal(square + warp * 16 * (kSquarePitch + 1));
      __syncthreads();
      invert_column(square, warp);
      __syncthreads();
      store_inverse(square, memory.beta[i], kernel.factors.inverse[index]);
    }
  }
}

}  // namespace xgdn::kernel::cuda
