// SPDX-License-Identifier: Apache-2.0
// Attention of sequences of many tokens on tensor cores.
//
// A block has one key head and a tile of rows of queries, each warp its own 16 or 32 of them, and walks over tiles of
// 64 rows of the context up to the last one that its rows see:
//   S = Q K^T   m' = max(m, row max of S)   P = 2^(c (S - m'))   l = 2^(c (m - m')) l + row sum of P
//   O = 2^(c (m - m')) O + P V   and at the end O / l,   c = scale log2(e)
// Keys and values go through a ring of three tiles in shared memory: while one is worked on, the next one is on its
// way. Rounding: products sum in f32, P is rounded to the dtype, O once at the end.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/cache_codes.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/paged_attention.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

/// Tiles for a head dim: 64 columns or fewer of O leave a warp registers for 32 rows.
template <int kDim>
struct PrefillTiles {
  static constexpr int kWarps = kDim > 128 ? 8 : 4;
  static constexpr int kWarpTiles = kDim > 128 ? 1 : 2;  // of 16 rows
  static constexpr int kWarpRows = kWarpTiles * 16;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kRows = kWarps * kWarpRows;  // of queries
  static constexpr int kKeys = 64;                  // rows of the cache
  static constexpr int kSlots = 3;
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * kTileBytes;
};

/// Begins to copy a tile of keys or values, or copies codes, of which the bytes in the cache where the rows begin are
/// given; -1: zeros.
template <class Element, int kDim, bool kIsInt8>
__device__ inline void copy_tile(const PagedAttentionArgs& args, const char* of_head, const int64_t* rows,
                                 uint32_t to) {
  using Tiles = PrefillTiles<kDim>;
  constexpr int kPieces = kDim / 8;
  constexpr int kRowsAtOnce = Tiles::kThreads / kPieces;
  static_assert(kRowsAtOnce % 8 == 0);  // so that the swizzle of a thread's pieces is the same
  const int row = threadIdx.x / kPieces;
  const int piece = threadIdx.x % kPieces;
  const bool is_inside = piece * 8 < args.D;
  const char* from = of_head + piece * (kIsInt8 ? 8 : 16);
  to += swizzled<kDim>(row, piece);
#pragma unroll
  for (int i = 0; i < Tiles::kKeys; i += kRowsAtOnce) {
    const int64_t offset = rows[row + i];
    const bool is_valid = offset >= 0 && is_inside;
    if constexpr (kIsInt8) {
      uint4 x = {};
      if (is_valid) x = load_codes<Element>(from + offset, of_head + offset + args.D);
      store_shared(to + i * kDim * 2, x);
      continue;
    }
    copy_async(to + i * kDim * 2, is_valid ? from + offset : of_head, !is_valid);
  }
}

/// Blocks: (tile of rows and key head, share of the context).
template <class Element, int kDim, bool kIsInt8>
__global__ void __launch_bounds__(PrefillTiles<kDim>::kThreads)
    attend_prefill(const PagedAttentionArgs args, const TileCall call) {
  using Tiles = PrefillTiles<kDim>;
  constexpr int kPieces = kDim / 8;
  constexpr int kWarpTiles = Tiles::kWarpTiles;
  constexpr int kKeys = Tiles::kKeys;
  const int G = static_cast<int>(args.HQ / args.HKV);
  const int64_t head = blockIdx.x % args.HKV;
  begin_overlapped();
  const QueryTile tile = query_tile(args, blockIdx.x / args.HKV, Tiles::kRows);
  if (tile.sequence < 0) return;
  const AttendedSequence s = sequence_of(args, tile.sequence);
  const int num_queries = min(Tiles::kRows, s.len * G - tile.first);
  // Rows of the context that the last and the first row of the tile see.
  const auto [begin, end] =
      share_of(call, visible_rows(s, (tile.first + num_queries - 1) / G), kKeys, static_cast<int>(blockIdx.y));
  const int common_end = visible_rows(s, tile.first / G);

  extern __shared__ __align__(128) char shared[];
  __shared__ int64_t cache_rows[2][kKeys];  // where the rows begin of tiles with even and with odd numbers
  const uint32_t queries = shared_address(shared);
  const uint32_t ring = queries + Tiles::kQueryBytes;
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int32_t* blocks = args.block_table + tile.sequence * args.block_table_stride;
  const int64_t row_bytes = args.HKV * cache_row_bytes<Element, kIsInt8>(args);
  const auto find_row = [&, end = end](int key) { return key < end ? cache_row(args, blocks, key) * row_bytes : -1; };
  const int64_t head_bytes = head * cache_row_bytes<Element, kIsInt8>(args);
  const char* all_keys = static_cast<const char*>(args.k) + head_bytes;
  const char* all_values = static_cast<const char*>(args.v) + head_bytes;

  for (int i = threadIdx.x; i < 2 * kKeys; i += Tiles::kThreads) cache_rows[i / kKeys][i % kKeys] = find_row(begin + i);
  load_queries<Element, kDim, Tiles::kRows, Tiles::kThreads>(args, s, head, tile.first, num_queries, call.is_aligned,
                                                             shared);
  __syncthreads();
  copy_tile<Element, kDim, kIsInt8>(args, all_keys, cache_rows[0], ring);
  commit_copies();
  copy_tile<Element, kDim, kIsInt8>(args, all_values, cache_rows[0], ring + Tiles::kTileBytes);
  commit_copies();

  // Lane l has rows l / 4 and l / 4 + 8 of each tile of 16.
  const auto query_of = [&](int t, int i) { return warp * Tiles::kWarpRows + t * 16 + lane / 4 + i * 8; };
  int visible[kWarpTiles][2];
  for (int t = 0; t < kWarpTiles; ++t) {
    for (int i = 0; i < 2; ++i) {
      const int query = query_of(t, i);
      visible[t][i] = query < num_queries ? visible_rows(s, (tile.first + query) / G) : 0;
    }
  }
  const float scale = args.scale * kLog2E;
  float most[kWarpTiles][2];
  float sums[kWarpTiles][2] = {};
  float values[kWarpTiles][kPieces][4] = {};
  for (int t = 0; t < kWarpTiles; ++t) most[t][0] = most[t][1] = -INFINITY;

  int slot = 0;  // of the keys of this tile
  const auto slot_address = [&](int ahead) {
    const int i = slot + ahead;
    return ring + static_cast<uint32_t>((i >= Tiles::kSlots ? i - Tiles::kSlots : i) * Tiles::kTileBytes);
  };
  int parity = 0;
  for (int key = begin; key < end; key += kKeys) {
    // Keys have come, and all warps are done with the values before them, whose slot gets the next keys.
    wait_copies<1>();
    __syncthreads();
    copy_tile<Element, kDim, kIsInt8>(args, all_keys, cache_rows[parity ^ 1], slot_address(2));
    commit_copies();
    int64_t later_row = -1;
    if (threadIdx.x < kKeys) later_row = find_row(key + 2 * kKeys + static_cast<int>(threadIdx.x));

    float scores[kWarpTiles][kKeys / 8][4] = {};
    const uint32_t keys = slot_address(0);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kWarpTiles][4];
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        load_matrices(queries + swizzled<kDim>(warp * Tiles::kWarpRows + t * 16 + lane % 16, 2 * step + lane / 16),
                      a[t]);
      }
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        uint32_t b[4];
        load_matrices(keys + swizzled<kDim>(pair * 16 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2), b);
#pragma unroll
        for (int t = 0; t < kWarpTiles; ++t) {
          multiply_add<Element>(scores[t][2 * pair], a[t], b[0], b[1]);
          multiply_add<Element>(scores[t][2 * pair + 1], a[t], b[2], b[3]);
        }
      }
    }

    if (key + kKeys > common_end) {
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (key + j * 8 + lane % 4 * 2 + i % 2 >= visible[t][i / 2]) scores[t][j][i] = -INFINITY;
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = most[t][i];
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) m = fmaxf(m, fmaxf(scores[t][j][2 * i], scores[t][j][2 * i + 1]));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 1));
        m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, 2));
        const float base = m == -INFINITY ? 0.0f : m * scale;
        const float factor = exp2_fast(most[t][i] * scale - base);
        most[t][i] = m;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            scores[t][j][c] = exp2_fast(fmaf(scores[t][j][c], scale, -base));
            sum += scores[t][j][c];
          }
        }
        sums[t][i] = sums[t][i] * factor + sum;  // of this lane's columns
        if (__any_sync(kAllLanes, factor != 1.0f)) {
#pragma unroll
          for (int j = 0; j < kPieces; ++j) {
            values[t][j][2 * i] *= factor;
            values[t][j][2 * i + 1] *= factor;
          }
        }
      }
    }

    // Values have come, and all warps are done with the keys, whose slot gets the next values.
    if (threadIdx.x < kKeys) cache_rows[parity][threadIdx.x] = later_row;
    wait_copies<1>();
    __syncthreads();
    copy_tile<Element, kDim, kIsInt8>(args, all_values, cache_rows[parity ^ 1], slot_address(0));
    commit_copies();
    const uint32_t rows = slot_address(1);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[kWarpTiles][4];
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        a[t][0] = packed<Element>(scores[t][2 * step][0], scores[t][2 * step][1]);
        a[t][1] = packed<Element>(scores[t][2 * step][2], scores[t][2 * step][3]);
        a[t][2] = packed<Element>(scores[t][2 * step + 1][0], scores[t][2 * step + 1][1]);
        a[t][3] = packed<Element>(scores[t][2 * step + 1][2], scores[t][2 * step + 1][3]);
      }
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        uint32_t b[4];
        load_matrices_transposed(rows + swizzled<kDim>(step * 16 + lane % 16, 2 * pair + lane / 16), b);
#pragma unroll
        for (int t = 0; t < kWarpTiles; ++t) {
          multiply_add<Element>(values[t][2 * pair], a[t], b[0], b[1]);
          multiply_add<Element>(values[t][2 * pair + 1], a[t], b[2], b[3]);
        }
      }
    }
    slot = slot == 0 ? 2 : slot - 1;
    parity ^= 1;
  }
  wait_copies<0>();

#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[t][i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int query = query_of(t, i);
      if (query >= num_queries) continue;
      store_query<Element>(args, call, s, head, tile.first + query, static_cast<int>(blockIdx.y), values[t], i, sum,
                           most[t][i] * scale);
    }
  }
}

}  // namespace xgdn::kernel::cuda
