// SPDX-License-Identifier: Apache-2.0
// Attention of sequences of many tokens on Hopper: paged_attention_prefill.cuh with products of warp groups.
//
// One warp group brings keys and values to a ring of four tiles in shared memory; two others have 64 rows of queries
// each. While the tensor cores work on P V of one tile, and before that on Q K^T of the next one, the exponentials of
// the next one are computed. Loads are in the order in which they are needed: K 0, K 1, V 0, K 2, V 1, ...
#pragma once

#include <cstdint>

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/cache_codes.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/paged_attention.cuh"
#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/cuda/warp_group_products.cuh"

namespace xgdn::kernel::cuda {

template <int kDim>
struct HopperTiles {
  static constexpr int kGroupThreads = 128;
  static constexpr int kThreads = 3 * kGroupThreads;
  static constexpr int kRows = 128;  // of queries
  static constexpr int kKeys = kDim > 128 ? 64 : 128;
  static constexpr int kSlots = 4;
  static constexpr int kBlockColumns = 64;
  static constexpr int kRowBytes = kBlockColumns * 2;
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kAlignment = 1024;  // of the swizzle
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kTileBytes + kAlignment;
};

#if __CUDA_ARCH_FEAT_SM90_ALL

/// The ring: slot and phase of load i.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

/// Rows of the cache for one warp of the loading group: its quarter of a tile.
template <class Element, int kDim, bool kIsInt8>
class HopperLoader {
 public:
  using Tiles = HopperTiles<kDim>;
  static constexpr int kWarpRows = Tiles::kKeys / 4;

  __device__ HopperLoader(const PagedAttentionArgs& args, const int32_t* blocks, int end)
      : args_(args), blocks_(blocks), end_(end), warp_(threadIdx.x / kLanes % 4), lane_(threadIdx.x % kLanes) {}

  /// The row of the cache of this lane in the tile that begins at `key`; -1: behind the end.
  __device__ int find(int key) const {
    const int row = key + warp_ * kWarpRows + lane_ % kWarpRows;
    return row < end_ ? static_cast<int>(cache_row(args_, blocks_, row)) : -1;
  }

  /// Begins to copy the tile, or copies codes.
  __device__ void copy(const char* of_head, int cache_row, uint32_t to) const {
    constexpr int kPieces = kDim / 8;
    constexpr int kPieceBytes = kIsInt8 ? 8 : 16;
    const auto row_bytes = static_cast<uint32_t>(args_.HKV * cache_row_bytes<Element, kIsInt8>(args_));
#pragma unroll 8  // the loading group has few registers
    for (int i = 0; i < kWarpRows * kPieces / kLanes; ++i) {
      const int index = i * kLanes + lane_;
      const int row = index / kPieces;
      const int piece = index % kPieces;
      const int from = __shfl_sync(kAllLanes, cache_row, row);
      const bool is_valid = from >= 0 && piece * 8 < args_.D;
      const char* source = of_head + static_cast<uint64_t>(static_cast<uint32_t>(from)) * row_bytes;
      const uint32_t target = to + group_swizzled(warp_ * kWarpRows + row, piece, Tiles::kKeys);
      if constexpr (kIsInt8) {
        uint4 x = {};
        if (is_valid) x = load_codes<Element>(source + piece * kPieceBytes, source + args_.D);
        store_shared(target, x);
      } else {
        copy_async(target, is_valid ? source + piece * kPieceBytes : of_head, !is_valid);
      }
    }
  }

 private:
  const PagedAttentionArgs& args_;
  const int32_t* blocks_;
  int end_;
  int warp_;
  int lane_;
};

/// Turns scores into weights. Returns in `factor` by what the sums before them shrink.
template <int kTiles>
__device__ inline void weigh(float (&scores)[kTiles][4], float scale, float (&most)[2], float (&sums)[2],
                             float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float m = most[i];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) m = fmaxf(m, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
    m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
    m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
    const float base = m == -INFINITY ? 0.0f : m * scale;
    factor[i] = exp2_fast(most[i] * scale - base);
    most[i] = m;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int c = 2 * i; c < 2 * i + 2; ++c) {
        scores[j][c] = exp2_fast(fmaf(scores[j][c], scale, -base));
        sum += scores[j][c];
      }
    }
    sums[i] = sums[i] * factor[i] + sum;  // of this lane's columns
  }
}

#endif

/// Blocks: (tile of rows and key head, share of the context).
template <class Element, int kDim, bool kIsInt8>
__global__ void __launch_bounds__(HopperTiles<kDim>::kThreads, 1)
    attend_prefill_hopper(const __grid_constant__ PagedAttentionArgs args, const TileCall call) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  using Tiles = HopperTiles<kDim>;
  constexpr int kPieces = kDim / 8;
  constexpr int kKeys = Tiles::kKeys;
  constexpr int kScoreTiles = kKeys / 8;
  constexpr int kConsumerWarps = 8;
  const int G = static_cast<int>(args.HQ / args.HKV);
  const int64_t head = blockIdx.x % args.HKV;
  begin_overlapped();
  const QueryTile tile = query_tile(args, blockIdx.x / args.HKV, Tiles::kRows);
  if (tile.sequence < 0) return;
  const AttendedSequence s = sequence_of(args, tile.sequence);
  const int num_queries = min(Tiles::kRows, s.len * G - tile.first);
  const auto share = static_cast<int>(blockIdx.y);
  const ContextShare rows_seen = share_of(call, visible_rows(s, (tile.first + num_queries - 1) / G), kKeys, share);
  const int begin = rows_seen.begin;
  const int end = rows_seen.end;
  const int common_end = visible_rows(s, tile.first / G);
  const int num_tiles = end > begin ? (end - begin + kKeys - 1) / kKeys : 0;

  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t barriers[2 * Tiles::kSlots];
  char* shared = unaligned + (-shared_address(unaligned) & (Tiles::kAlignment - 1));
  const uint32_t queries = shared_address(shared);
  const uint32_t ring = queries + Tiles::kQueryBytes;
  const auto full = [&](int slot) { return shared_address(barriers + slot); };
  const auto empty = [&](int slot) { return shared_address(barriers + Tiles::kSlots + slot); };
  const int group = threadIdx.x / Tiles::kGroupThreads;
  const int lane = threadIdx.x % kLanes;

  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiles::kSlots; ++i) {
      init_barrier(full(i), Tiles::kGroupThreads);
      init_barrier(empty(i), kConsumerWarps);
    }
  }
  for (int index = threadIdx.x; index < Tiles::kRows * kPieces; index += Tiles::kThreads) {
    const int query = index / kPieces;
    const int piece = index % kPieces;
    uint4 x = {};
    if (query < num_queries && piece * 8 < args.D) {
      const int row = tile.first + query;
      x = load_8(row_of<Element>(args.q, s.begin + row / G, head * G + row % G) + piece * 8, call.is_aligned);
    }
    *reinterpret_cast<uint4*>(shared + group_swizzled(query, piece, Tiles::kRows)) = x;
  }
  fence_shared_memory();
  __syncthreads();

  RingPlace<Tiles::kSlots> place;
  if (group == 0) {
    leave_registers<56>();
    const HopperLoader<Element, kDim, kIsInt8> loader(args, args.block_table + tile.sequence * args.block_table_stride,
                                                      end);
    const int64_t head_bytes = head * cache_row_bytes<Element, kIsInt8>(args);
    const char* all_keys = static_cast<const char*>(args.k) + head_bytes;
    const char* all_values = static_cast<const char*>(args.v) + head_bytes;
    int rows = loader.find(begin);
    int next_rows = loader.find(begin + kKeys);
    int last_slot = -1;
    const auto load = [&](const char* of_head, int cache_rows) {
      wait_at(empty(place.slot), place.phase ^ 1);  // the first round does not wait
      loader.copy(of_head, cache_rows, ring + place.slot * Tiles::kTileBytes);
      if constexpr (kIsInt8) {
        fence_shared_memory();
        arrive_at(full(place.slot));
        return place.advance();
      }
      commit_copies();
      if (last_slot >= 0) {
        wait_copies<1>();
        fence_shared_memory();
        arrive_at(full(last_slot));
      }
      last_slot = place.slot;
      place.advance();
    };
    if (num_tiles > 0) load(all_keys, rows);
    for (int t = 0; t < num_tiles; ++t) {
      const int later_rows = loader.find(begin + (t + 2) * kKeys);
      if (t + 1 < num_tiles) load(all_keys, next_rows);
      load(all_values, rows);
      rows = next_rows;
      next_rows = later_rows;
    }
    if (last_slot >= 0) {
      wait_copies<0>();
      fence_shared_memory();
      arrive_at(full(last_slot));
    }
  } else {
    take_registers<224>();
    const int first_row = (group - 1) * 64;
    const int warp_row = first_row + static_cast<int>(threadIdx.x) / kLanes % 4 * 16 + lane / 4;
    int visible[2];
    for (int i = 0; i < 2; ++i) {
      const int query = warp_row + i * 8;
      visible[i] = query < num_queries ? visible_rows(s, (tile.first + query) / G) : 0;
    }
    const float scale = args.scale * kLog2E;
    float most[2] = {-INFINITY, -INFINITY};
    float sums[2] = {};
    float values[kPieces][4] = {};
    float scores[kScoreTiles][4];
    uint32_t weights[kKeys / 16][4];

    const auto start_scores = [&] {
      const uint32_t keys = ring + place.slot * Tiles::kTileBytes;
      fence_products();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const uint32_t in_block = step % 4 * 32;
        const uint64_t a = group_matrix(queries + (step / 4 * Tiles::kRows + first_row) * Tiles::kRowBytes + in_block);
        const uint64_t b = group_matrix(keys + step / 4 * kKeys * Tiles::kRowBytes + in_block);
        start_product<Element>(scores, a, b, step > 0);
      }
      commit_products();
    };
    const auto start_values = [&] {
      const uint32_t rows = ring + place.slot * Tiles::kTileBytes;
      fence_products();
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
        const uint64_t b = group_matrix(rows + step * 16 * Tiles::kRowBytes, kKeys * Tiles::kRowBytes);
        start_product<Element>(values, weights[step], b);
      }
      commit_products();
    };
    const auto release = [&](int slot) {
      __syncwarp();
      if (lane == 0) arrive_at(empty(slot));
    };
    const auto mask = [&](int key) {
      if (key + kKeys <= common_end) return;
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key + j * 8 + lane % 4 * 2 + i % 2 >= visible[i / 2]) scores[j][i] = -INFINITY;
        }
      }
    };
    const auto pack_weights = [&] {
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = scores[2 * step + i / 2] + i % 2 * 2;
          weights[step][i] = packed<Element>(pair[0], pair[1]);
        }
      }
    };

    if (num_tiles > 0) {
      float factor[2];
      wait_at(full(place.slot), place.phase);
      start_scores();
      wait_products<0>();
      pin(scores);
      release(place.slot);
      place.advance();
      mask(begin);
      weigh(scores, scale, most, sums, factor);
      pack_weights();
      for (int t = 1; t < num_tiles; ++t) {
        wait_at(full(place.slot), place.phase);
        start_scores();
        const int key_slot = place.slot;
        place.advance();
        wait_at(full(place.slot), place.phase);
        start_values();
        wait_products<1>();
        pin(scores);
        release(key_slot);
        mask(begin + t * kKeys);
        weigh(scores, scale, most, sums, factor);
        wait_products<0>();
        pin(values);
        pin(scores);  // packing them before would overwrite weights that are being read
        release(place.slot);
        place.advance();
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) values[j][i] *= factor[i / 2];
        }
        pack_weights();
      }
      wait_at(full(place.slot), place.phase);
      start_values();
      wait_products<0>();
      pin(values);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int query = warp_row + i * 8;
      if (query >= num_queries) continue;
      store_query<Element>(args, call, s, head, tile.first + query, share, values, i, sum, most[i] * scale);
    }
  }
#endif
}

}  // namespace xgdn::kernel::cuda
