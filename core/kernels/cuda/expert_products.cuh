// SPDX-License-Identifier: Apache-2.0
// Products of the experts of a mixture: the visits of each expert times its own weight.
//
// A block has one tile of visits and a tile of outputs. Weights are the left side of the product, visits its columns,
// so that an expert with few visits costs few columns. Order of a sum: ascending depth, by 16 on tensor cores and by 1
// in f32, whatever the tiles: a token has the same bits whoever is beside it.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/expert_visits.cuh"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/warp_group_products.cuh"

namespace xgdn::kernel::cuda {

/// y = x weight^T, or silu(x gate^T) * (x up^T), of all visits.
struct ExpertProductArgs {
  ExpertVisits visits;
  const void* x = nullptr;
  int64_t x_stride = 0;
  int choices = 0;  // not 0: x has the rows of the tokens, this many choices each; else those of sorted visits
  const void* weight = nullptr;  // [E, rows, depth]
  int64_t expert_stride = 0;     // elements
  int64_t depth = 0;
  int64_t outputs = 0;
  void* y = nullptr;         // [V, outputs]
  bool y_is_sorted = false;  // else in the order of the visits
};

/// The row of x that a sorted visit reads, and that of y which it writes.
__device__ inline int64_t x_row(const ExpertProductArgs& args, int place) {
  return args.choices != 0 ? args.visits.sorted[place] / args.choices : place;
}
__device__ inline int64_t y_row(const ExpertProductArgs& args, int place) {
  return args.y_is_sorted ? place : args.visits.sorted[place];
}

/// kColumns visits; kRowWarps * 32 rows of weights, of each warp 16 in the lower half of the tile and 16 in the upper
/// half: these are a gate and its up, where kIsGated.
template <int kColumns_, int kRowWarps_, int kStages_>
struct ProductTiles {
  static constexpr int kColumns = kColumns_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kColumnWarps = 2;
  static constexpr int kThreads = kRowWarps * kColumnWarps * 32;
  static constexpr int kRows = kRowWarps * 32;
  static constexpr int kDepth = 64;
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kWarpColumns = kColumns / kColumnWarps;
};

/// Byte of a 16-byte piece of a row in a stage: pieces are exchanged so that neighbouring rows differ in banks.
__device__ inline uint32_t stage_byte(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + (piece ^ (row & 7)) * 16);
}

/// A block's share of the work. kOutputs: outputs of a tile; kColumns: visits of one.
template <class Tiles, bool kIsGated>
struct ProductWork {
  static constexpr int kHalf = Tiles::kRows / 2;
  static constexpr int kOutputs = kIsGated ? kHalf : Tiles::kRows;

  VisitTile tile = {.expert = -1};  // -1: none
  int64_t first_output = 0;

  __device__ explicit ProductWork(const ExpertProductArgs& args) {
    const auto output_tiles = static_cast<unsigned>((args.outputs + kOutputs - 1) / kOutputs);
    const int index = static_cast<int>(blockIdx.x / output_tiles);
    if (index < *args.visits.num_tiles) tile = args.visits.tiles[index];
    first_output = static_cast<int64_t>(blockIdx.x % output_tiles) * kOutputs;
  }
};

/// Begins to copy the 64 of the depth of a step, of the weights and, behind them, of the visits, to `to`. x_offsets:
/// where the rows of the visits begin, -1: zeros.
template <class Element, class Tiles, bool kIsGated>
__device__ inline void copy_stage(const ExpertProductArgs& args, const ProductWork<Tiles, kIsGated>& work,
                                  const int64_t* x_offsets, int step, uint32_t to) {
  constexpr int kPieces = Tiles::kRowBytes / 16;
  constexpr int kHalf = Tiles::kRows / 2;
  const int64_t first_depth = static_cast<int64_t>(step) * Tiles::kDepth;
  const auto* weight = static_cast<const Element*>(args.weight) + work.tile.expert * args.expert_stride;
  const auto* x = static_cast<const Element*>(args.x);
#pragma unroll
  for (int i = 0; i < Tiles::kRows * kPieces / Tiles::kThreads; ++i) {
    const int index = i * Tiles::kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int64_t depth = first_depth + index % kPieces * 8;
    // The upper half of a gated tile has the rows of `up` for the same outputs.
    const int64_t output = work.first_output + (kIsGated ? row % kHalf : row);
    const int64_t from = output + (kIsGated && row >= kHalf ? args.outputs : 0);
    const bool is_valid = output < args.outputs && depth < args.depth;
    copy_async(to + stage_byte(row, index % kPieces), is_valid ? weight + from * args.depth + depth : weight,
               !is_valid);
  }
#pragma unroll
  for (int index = threadIdx.x; index < Tiles::kColumns * kPieces; index += Tiles::kThreads) {
    const int column = index / kPieces;
    const int64_t depth = first_depth + index % kPieces * 8;
    const bool is_valid = x_offsets[column] >= 0 && depth < args.depth;
    copy_async(to + stage_byte(Tiles::kRows + column, index % kPieces), is_valid ? x + x_offsets[column] + depth : x,
               !is_valid);
  }
}

template <class Tiles>
__device__ inline void find_x_offsets(const ExpertProductArgs& args, const VisitTile& tile, int64_t* x_offsets) {
  for (int i = threadIdx.x; i < Tiles::kColumns; i += Tiles::kThreads) {
    x_offsets[i] = i < tile.count ? x_row(args, tile.begin + i) * args.x_stride : -1;
  }
}

/// Writes sums of a warp: 16 rows from `row` on of either half of the tile, columns from first_column on.
template <class Element, class Tiles, bool kIsGated, int kTiles>
__device__ inline void store_products(const ExpertProductArgs& args, const ProductWork<Tiles, kIsGated>& work, int row,
                                      int first_column, float (&sums)[2][kTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int column = first_column + j * 8 + lane / 4;
    Element* y = nullptr;
    if (column < work.tile.count) {
      y = static_cast<Element*>(args.y) + y_row(args, work.tile.begin + column) * args.outputs;
    }
    if constexpr (kIsGated) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][j][i] = silu(sums[0][j][i]) * sums[1][j][i];
    }
#pragma unroll
    for (int half = 0; half < (kIsGated ? 1 : 2); ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Transposed, a lane has two neighbouring outputs of one visit.
        const uint32_t pair = transpose_matrix(packed<Element>(sums[half][j][2 * i], sums[half][j][2 * i + 1]));
        const int64_t output = work.first_output + half * (Tiles::kRows / 2) + row + i * 8 + lane % 4 * 2;
        if (y != nullptr && output < args.outputs) *reinterpret_cast<uint32_t*>(y + output) = pair;
      }
    }
  }
}

/// Blocks: tile of outputs, fastest, and tile of visits.
template <class Element, class Tiles, bool kIsGated>
__global__ void __launch_bounds__(Tiles::kThreads) multiply_experts(const ExpertProductArgs args) {
  constexpr int kTiles = Tiles::kWarpColumns / 8;
  constexpr int kHalf = Tiles::kRows / 2;
  begin_overlapped();
  const ProductWork<Tiles, kIsGated> work(args);
  if (work.tile.expert < 0) return;
  extern __shared__ __align__(128) char shared[];
  __shared__ int64_t x_offsets[Tiles::kColumns];
  const uint32_t stages = shared_address(shared);
  const int lane = threadIdx.x % 32;
  const int row_warp = threadIdx.x / 32 % Tiles::kRowWarps;
  const int column_warp = threadIdx.x / 32 / Tiles::kRowWarps;
  find_x_offsets<Tiles>(args, work.tile, x_offsets);
  __syncthreads();

  const int num_steps = static_cast<int>((args.depth + Tiles::kDepth - 1) / Tiles::kDepth);
  const auto stage_of = [&](int step) { return stages + step % Tiles::kStages * Tiles::kStageBytes; };
  const auto copy = [&](int step) {
    if (step < num_steps) copy_stage<Element>(args, work, x_offsets, step, stage_of(step));
    commit_copies();
  };
  for (int step = 0; step < Tiles::kStages - 1; ++step) copy(step);

  float sums[2][kTiles][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    wait_copies<Tiles::kStages - 2>();
    __syncthreads();
    copy(step + Tiles::kStages - 1);
    const uint32_t stage = stage_of(step);
#pragma unroll
    for (int pair = 0; pair < Tiles::kDepth / 32; ++pair) {
      uint32_t a[2][2][4];  // [half][16 of depth]
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          load_matrices(stage + stage_byte(half * kHalf + row_warp * 16 + lane % 16, (pair * 2 + k) * 2 + lane / 16),
                        a[half][k]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        uint32_t b[4];
        const int column = column_warp * Tiles::kWarpColumns + j * 8 + lane % 8;
        load_matrices(stage + stage_byte(Tiles::kRows + column, pair * 4 + lane / 8), b);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          multiply_add<Element>(sums[half][j], a[half][0], b[0], b[1]);
          multiply_add<Element>(sums[half][j], a[half][1], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
  store_products<Element>(args, work, row_warp * 16, column_warp * Tiles::kWarpColumns, sums);
}

/// Tiles of multiply_experts_hopper: two warp groups have 64 rows of either half each.
struct HopperProductTiles {
  static constexpr int kColumns = 128;
  static constexpr int kStages = 4;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 256;
  static constexpr int kDepth = 64;
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kAlignment = 1024;  // of the swizzle
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
};

/// multiply_experts for experts with many visits, with products of warp groups.
template <class Element, bool kIsGated>
__global__ void __launch_bounds__(HopperProductTiles::kThreads, 1)
    multiply_experts_hopper(const ExpertProductArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using Tiles = HopperProductTiles;
  constexpr int kTiles = Tiles::kColumns / 8;
  begin_overlapped();
  const ProductWork<Tiles, kIsGated> work(args);
  if (work.tile.expert < 0) return;
  extern __shared__ char unaligned[];
  __shared__ int64_t x_offsets[Tiles::kColumns];
  const uint32_t stages = (shared_address(unaligned) + Tiles::kAlignment - 1) & ~(Tiles::kAlignment - 1u);
  const int group = threadIdx.x / 128;
  find_x_offsets<Tiles>(args, work.tile, x_offsets);
  __syncthreads();

  const int num_steps = static_cast<int>((args.depth + Tiles::kDepth - 1) / Tiles::kDepth);
  const auto stage_of = [&](int step) { return stages + step % Tiles::kStages * Tiles::kStageBytes; };
  const auto copy = [&](int step) {
    if (step < num_steps) copy_stage<Element>(args, work, x_offsets, step, stage_of(step));
    commit_copies();
  };
  // Products of one step run while the next ones are started, so two stages are on their way and two are read.
  constexpr int kAhead = Tiles::kStages - 2;
  for (int step = 0; step < kAhead; ++step) copy(step);

  float sums[2][kTiles][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    wait_copies<kAhead - 1>();
    fence_shared_memory();
    __syncthreads();
    const uint32_t stage = stage_of(step);
    fence_products();
#pragma unroll
    for (int k = 0; k < Tiles::kDepth / 16; ++k) {
      const uint64_t b = group_matrix(stage + Tiles::kRows * Tiles::kRowBytes + k * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint64_t a = group_matrix(stage + (half * Tiles::kRows / 2 + group * 64) * Tiles::kRowBytes + k * 32);
        start_product<Element>(sums[half], a, b, /*adds=*/true);
      }
    }
    commit_products();
    copy(step + kAhead);  // where the products of the step before last read, which all have waited for
    wait_products<1>();
  }
  wait_products<0>();
  wait_copies<0>();
  pin(sums[0]);
  pin(sums[1]);
  store_products<Element>(args, work, group * 64 + static_cast<int>(threadIdx.x) / 32 % 4 * 16, 0, sums);
#endif
}

/// The same in f32 without tensor cores: 64 visits and 64 outputs, of which a thread has 4 by 4. kIsGated: 32 gates and
/// their 32 ups are the 64 rows.
inline constexpr int kF32ProductThreads = 256;
inline constexpr int kF32Tile = 64;
inline constexpr int kF32Depth = 16;

template <bool kIsGated>
__global__ void __launch_bounds__(kF32ProductThreads) multiply_experts_f32(const ExpertProductArgs args) {
  constexpr int kHalf = kF32Tile / 2;
  constexpr int kOutputs = kIsGated ? kHalf : kF32Tile;
  constexpr int kStride = kF32Tile + 4;
  const auto output_tiles = static_cast<unsigned>((args.outputs + kOutputs - 1) / kOutputs);
  const int tile_index = static_cast<int>(blockIdx.x / output_tiles);
  begin_overlapped();
  if (tile_index >= *args.visits.num_tiles) return;
  const VisitTile tile = args.visits.tiles[tile_index];
  const int64_t first_output = static_cast<int64_t>(blockIdx.x % output_tiles) * kOutputs;
  __shared__ float rows[kF32Depth][kStride];
  __shared__ float columns[kF32Depth][kStride];
  const int thread = threadIdx.x;
  const auto* weight = static_cast<const float*>(args.weight) + tile.expert * args.expert_stride;

  // This thread brings four neighbours of one row and of one column, and sums rows 2 i, + 1 of both halves.
  const int brought = thread / 4;
  const int depth_of_thread = thread % 4 * 4;
  const int64_t output = first_output + (kIsGated ? brought % kHalf : brought);
  const float* from_weight = nullptr;
  if (output < args.outputs) {
    from_weight = weight + (output + (kIsGated && brought >= kHalf ? args.outputs : 0)) * args.depth;
  }
  const float* from_x = nullptr;
  if (brought < tile.count) {
    from_x = static_cast<const float*>(args.x) + x_row(args, tile.begin + brought) * args.x_stride;
  }
  const int pair = thread / 16;   // of rows
  const int group = thread % 16;  // of 4 columns
  float sums[4][4] = {};
  for (int64_t step = 0; step < args.depth; step += kF32Depth) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t depth = step + depth_of_thread + i;
      rows[depth_of_thread + i][brought] = from_weight != nullptr && depth < args.depth ? from_weight[depth] : 0.0f;
      columns[depth_of_thread + i][brought] = from_x != nullptr && depth < args.depth ? from_x[depth] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kF32Depth; ++k) {
      const float a[4] = {rows[k][pair * 2], rows[k][pair * 2 + 1], rows[k][kHalf + pair * 2],
                          rows[k][kHalf + pair * 2 + 1]};
      const float4 b = *reinterpret_cast<const float4*>(&columns[k][group * 4]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i][0] = fmaf(a[i], b.x, sums[i][0]);
        sums[i][1] = fmaf(a[i], b.y, sums[i][1]);
        sums[i][2] = fmaf(a[i], b.z, sums[i][2]);
        sums[i][3] = fmaf(a[i], b.w, sums[i][3]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = group * 4 + j;
    if (column >= tile.count) break;
    float* y = static_cast<float*>(args.y) + y_row(args, tile.begin + column) * args.outputs;
#pragma unroll
    for (int i = 0; i < (kIsGated ? 2 : 4); ++i) {
      const int64_t to = first_output + i / 2 * kHalf + pair * 2 + i % 2;
      if (to < args.outputs) y[to] = kIsGated ? silu(sums[i][j]) * sums[i + 2 < 4 ? i + 2 : i][j] : sums[i][j];
    }
  }
}

}  // namespace xgdn::kernel::cuda
