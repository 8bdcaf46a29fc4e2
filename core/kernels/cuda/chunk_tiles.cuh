// SPDX-License-Identifier: Apache-2.0
// Tiles of chunk_gated_delta_rule, and products with them: 64 rows of bf16 in panels of 64 columns. A row of a panel is
// 8 pieces of 16 bytes; piece p of row r lies at place p ^ (r % 8), so that 8 rows of a piece fall into different
// banks.
#pragma once

#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kChunk = 64;
inline constexpr int kPieceBytes = 16;
inline constexpr int kPanelBytes = kChunk * 128;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// ---- what the first kernel leaves for the second
// ---------------------------------------------------------------------

/// Of a chunk and a value head, with b = cumsum g and the factors f_k, f_q that make k and q unit vectors.
struct alignas(16) ChunkGates {
  float read[kChunk];   // exp(b_j) f_k
  float write[kChunk];  // exp(b_last - b_j) f_k
  float out[kChunk];    // scale exp(b_j) f_q
  float last;           // exp(b_last)
  float unused[3];
};

/// A triangular matrix, in blocks of 8 x 8 whose rows of 16 bytes are neighbours: for every 16 columns, the rows from
/// the diagonal on in 16s from the last to the first, so that products with fewer columns start at the same register.
struct alignas(16) ChunkSquare {
  uint4 rows[40][8];

  /// The first of 16 columns' blocks.
  static __host__ __device__ constexpr int first_block(int columns) { return columns * (18 - 2 * columns); }
  /// The block of rows 8 i on and columns 8 j on.
  static __host__ __device__ constexpr int block_of(int i, int j) {
    return first_block(j / 2) + ((3 - i / 2) * 2 + i % 2) * 2 + j % 2;
  }
};

/// Of 8 tiles: which one has the place of tile i where 16s are in reverse.
__host__ __device__ constexpr int opposite_tile(int i) {
  return i ^ 6;
}

struct alignas(16) ChunkFactors {
  ChunkSquare inverse;  // (I + tril(beta D K K^T, -1))^-1 beta
  ChunkSquare scores;   // scale tril(D Q K^T)
  ChunkGates gates;
};

// ---- tiles ---------------------------------------------------------------------------------------------------------

/// Where piece `piece` of row `row` lies in a tile.
__device__ inline uint32_t piece_offset(int row, int piece) {
  return piece / 8 * kPanelBytes + row * 128 + (piece % 8 ^ row % 8) * kPieceBytes;
}

/// 8 elements of a row of any type, in bf16.
__device__ inline uint4 load_piece(DType dtype, bool is_aligned, const void* row, int64_t first) {
  RawElements<8> raw;
  raw.load(dtype, is_aligned, row, first);
  float x[8];
  raw.widen(dtype, x);
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// Products are of a warp group: its warp w has rows 16 w to 16 w + 15 of a and of sum. On Hopper they run beside the
// program: sum and a must stay as they are until wait_products; elsewhere they have ended when the function returns.

/// sum [64, 64] = a [64, 16 kSteps] b^T, with b a tile [64, 16 kSteps].
template <int kSteps>
__device__ inline void multiply_by_rows(float (&sum)[8][4], const uint32_t (&a)[kSteps][4], uint32_t b) {
  if constexpr (kHasGroupProducts) {
    const uint64_t rows = panel_descriptor(b, 16, 1024);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      start_product<false>(sum, a[step], rows + ((step / 4 * kPanelBytes + step % 4 * 32) >> 4), step > 0);
    }
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) sum[tile][0] = sum[tile][1] = sum[tile][2] = sum[tile][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < 8; tile += 2) {
        uint32_t x[4];
        load_matrices(b + piece_offset(tile * 8 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2), x);
        multiply_bf16(sum[tile], a[step], x[0], x[1]);
        multiply_bf16(sum[tile + 1], a[step], x[2], x[3]);
      }
    }
  }
}

/// sum [64, 64] = a [64, 64] b^T, with b a ChunkSquare: sum's tile i is of the rows 8 opposite_tile(i) of b on.
__device__ inline void multiply_by_square(float (&sum)[8][4], const uint32_t (&a)[4][4], uint32_t b) {
  constexpr auto at = [](int step) { return ChunkSquare::first_block(step) * 128; };
  if constexpr (kHasGroupProducts) {
    start_part_product<8>(sum, a[0], block_descriptor(b + at(0), 128, 256), false);
    start_part_product<6>(sum, a[1], block_descriptor(b + at(1), 128, 256), true);
    start_part_product<4>(sum, a[2], block_descriptor(b + at(2), 128, 256), true);
    start_part_product<2>(sum, a[3], block_descriptor(b + at(3), 128, 256), true);
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) sum[tile][0] = sum[tile][1] = sum[tile][2] = sum[tile][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int tile = 0; tile < 8 - 2 * step; tile += 2) {
        uint32_t x[4];
        load_matrices(b + at(step) + (tile + lane / 16) * 256 + lane / 8 % 2 * 128 + lane % 8 * 16, x);
        multiply_bf16(sum[tile], a[step], x[0], x[1]);
        multiply_bf16(sum[tile + 1], a[step], x[2], x[3]);
      }
    }
  }
}

/// sum [64, 8 kTiles] += a [64, 64] b, with b a tile [64, 8 kTiles].
template <int kTiles>
__device__ inline void multiply_by_columns(float (&sum)[kTiles][4], const uint32_t (&a)[4][4], uint32_t b) {
  if constexpr (kHasGroupProducts) {
    const uint64_t columns = panel_descriptor(b, kPanelBytes, 1024);
#pragma unroll
    for (int step = 0; step < 4; ++step) start_product<true>(sum, a[step], columns + (step * 2048 >> 4), true);
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t x[4];
        load_matrices_transposed(b + piece_offset(step * 16 + lane % 16, tile + lane / 16), x);
        multiply_bf16(sum[tile], a[step], x[0], x[1]);
        multiply_bf16(sum[tile + 1], a[step], x[2], x[3]);
      }
    }
  }
}

/// Sums, rounded, as the left operand of the next product.
template <int kTiles>
__device__ inline void round_sums(const float (&sum)[kTiles][4], uint32_t (&a)[kTiles / 2][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    a[tile / 2][tile % 2 * 2] = pack_bf16(sum[tile][0], sum[tile][1]);
    a[tile / 2][tile % 2 * 2 + 1] = pack_bf16(sum[tile][2], sum[tile][3]);
  }
}

}  // namespace xgdn::kernel::cuda
