// SPDX-License-Identifier: Apache-2.0
// Attention of sequences of few tokens (decode, verification) on tensor cores, limited by how fast the cache is read.
//
// For the rows of a sequence at one key head and a chunk of its context, s = scale log2(e) q . k:
//   m = max s   l = sum 2^(s - m)   o = sum 2^(s - m) v / l,   of all chunks then o = sum_c 2^(g_c - g) o_c,  g_c = m +
//   log2 l
// A block of four warps works on one chunk, 8 or 16 rows. Each warp reads its own tiles of 16 rows of the cache through
// its own ring of shared memory, waits for no other warp, and keeps its own m, l and o; they are joined at the end.
// Keys and values are the left sides of the products (S^T = K Q^T, O^T = V^T P^T), so that few rows fill the tensor
// cores' 8 columns. Rounding: products sum in f32, P is rounded to the dtype, o once at the end.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/cache_codes.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/paged_attention.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kSplitWarps = 4;
inline constexpr int kSplitSlots = 3;  // tiles of keys or values in a warp's ring
inline constexpr int kTileRows = 16;   // of the cache
inline constexpr int kGroupRows = 8;   // of queries

/// Shared memory of attend_split: a ring for each warp, of rows as they lie in the cache, with room behind the codes
/// for their scale; behind a ring of codes the tile that is worked on; behind all rings the queries.
template <int kDim, int kGroups, bool kIsInt8>
struct SplitMemory {
  static constexpr int kTileBytes = kTileRows * kDim * 2;
  static constexpr int kSlotRowBytes = kIsInt8 ? kDim + 16 : kDim * 2;
  static constexpr int kSlotBytes = kTileRows * kSlotRowBytes;
  static constexpr int kWarpBytes = kSplitSlots * kSlotBytes + (kIsInt8 ? kTileBytes : 0);
  static constexpr int kQueryRows = kGroups * kGroupRows;
  static constexpr int kReadBytes = kSplitWarps * kWarpBytes + kQueryRows * kDim * 2;
  // At the end, the results of the warps: rows with 4 floats behind them, which spread them over the banks, and m and
  // l.
  static constexpr int kJoinedBytes = kSplitWarps * kQueryRows * (kDim + 4 + 2) * 4;
  static constexpr int kBytes = kReadBytes > kJoinedBytes ? kReadBytes : kJoinedBytes;
};

/// A warp's way through its tiles of one chunk: tile i of the chunk, every kSplitWarps-th of them.
template <class Element, int kDim, bool kIsInt8>
class TileReader {
 public:
  __device__ TileReader(const PagedAttentionArgs& args, const int32_t* blocks, int end, int first_row)
      : args_(args), blocks_(blocks), end_(end), next_row_(first_row), lane_(threadIdx.x % kLanes) {
    fetch();
  }

  /// Goes to the next tile.
  __device__ void advance() {
    row_ = fetched_;
    next_row_ += kSplitWarps * kTileRows;
    fetch();
  }

  /// Begins to copy the tile from `of_head`, the first row of a cache.
  __device__ void copy(const char* of_head, uint32_t to) const {
    using Memory = SplitMemory<kDim, 1, kIsInt8>;
    constexpr int kPieceBytes = kIsInt8 ? 4 : 16;
    constexpr int kPieces = (kIsInt8 ? kDim : kDim * 2) / kPieceBytes;
    const auto head_bytes = static_cast<int>(cache_row_bytes<Element, kIsInt8>(args_));
    const auto row_bytes = static_cast<uint32_t>(args_.HKV) * static_cast<uint32_t>(head_bytes);
    const auto address = [&](int cache_row, int byte) {
      return of_head + static_cast<uint64_t>(static_cast<uint32_t>(cache_row)) * row_bytes + byte;
    };
#pragma unroll
    for (int i = 0; i < kTileRows * kPieces / kLanes; ++i) {
      const int index = i * kLanes + lane_;
      const int row = index / kPieces;
      const int piece = index % kPieces;
      const int cache_row = __shfl_sync(kAllLanes, row_, row);
      if constexpr (kIsInt8) {
        const bool is_valid = cache_row >= 0 && piece * kPieceBytes < args_.D;
        copy_word_async(to + row * Memory::kSlotRowBytes + piece * kPieceBytes,
                        is_valid ? address(cache_row, piece * kPieceBytes) : of_head, !is_valid);
      } else {
        const bool is_valid = cache_row >= 0 && piece * kPieceBytes < head_bytes;
        copy_async(to + swizzled<kDim>(row, piece), is_valid ? address(cache_row, piece * kPieceBytes) : of_head,
                   !is_valid);
      }
    }
    if constexpr (kIsInt8) {
      if (lane_ < kTileRows) {
        copy_word_async(to + lane_ * Memory::kSlotRowBytes + kDim,
                        row_ >= 0 ? address(row_, static_cast<int>(args_.D)) : of_head, row_ < 0);
      }
    }
  }

 private:
  // Reads the table one tile ahead.
  __device__ void fetch() {
    const int row = next_row_ + lane_ % kTileRows;
    fetched_ = row < end_ ? static_cast<int>(cache_row(args_, blocks_, row)) : -1;
  }

  const PagedAttentionArgs& args_;
  const int32_t* blocks_;
  int end_;
  int next_row_;
  int lane_;
  int fetched_ = -1;
  int row_ = -1;  // of the cache, of lane % 16 of the tile; -1: behind the chunk
};

/// Codes of a tile in shared memory as a tile of the dtype.
template <class Element, int kDim>
__device__ inline void widen_tile(const char* codes, uint32_t tile) {
  constexpr int kPieces = kDim / 8;
  constexpr int kRowBytes = SplitMemory<kDim, 1, true>::kSlotRowBytes;
#pragma unroll 8
  for (int i = 0; i < kTileRows * kPieces / kLanes; ++i) {
    const int index = i * kLanes + static_cast<int>(threadIdx.x) % kLanes;
    const char* row = codes + index / kPieces * kRowBytes;
    const uint4 x = widened_codes<Element>(*reinterpret_cast<const uint2*>(row + index % kPieces * 8),
                                           *reinterpret_cast<const float*>(row + kDim));
    store_shared(tile + swizzled<kDim>(index / kPieces, index % kPieces), x);
  }
}

struct SplitCall {
  ChunkResults results;
  bool is_aligned = false;  // rows of q, to 16 bytes
};

template <class Element, int kDim, int kGroups, bool kIsInt8>
__global__ void __launch_bounds__(kSplitWarps* kLanes)
    attend_split(const PagedAttentionArgs args, const SplitCall call) {
  const auto& [results, is_aligned] = call;
  using Memory = SplitMemory<kDim, kGroups, kIsInt8>;
  constexpr int kRows = kGroups * kGroupRows;
  constexpr int kSteps = kDim / 16;
  const int G = static_cast<int>(args.HQ / args.HKV);
  const int64_t head = blockIdx.x % args.HKV;
  const int64_t n = blockIdx.x / args.HKV;
  const int first_query = blockIdx.y * kRows;
  const int chunk = blockIdx.z;

  begin_overlapped();
  const AttendedSequence s = sequence_of(args, n);
  const int num_queries = min(kRows, s.len * G - first_query);
  const int rows_of_chunk = chunk_rows(results, s.context);
  const int begin = chunk * rows_of_chunk;
  if (!is_split(s) || num_queries <= 0 || (begin >= s.context && chunk > 0)) return;
  const bool is_whole = s.context <= rows_of_chunk;
  const int end = min(s.context, begin + rows_of_chunk);

  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  char* ring_memory = shared + warp * Memory::kWarpBytes;
  const uint32_t ring = shared_address(ring_memory);
  const uint32_t widened = ring + kSplitSlots * Memory::kSlotBytes;

  TileReader<Element, kDim, kIsInt8> reader(args, args.block_table + n * args.block_table_stride, end,
                                            begin + warp * kTileRows);
  const int64_t head_bytes = head * cache_row_bytes<Element, kIsInt8>(args);
  const char* all_keys = static_cast<const char*>(args.k) + head_bytes;
  const char* all_values = static_cast<const char*>(args.v) + head_bytes;
  reader.advance();
  reader.copy(all_keys, ring);
  commit_copies();
  reader.copy(all_values, ring + Memory::kSlotBytes);
  commit_copies();

  // Right sides of K Q^T, and what this lane's columns see.
  char* query_rows = shared + kSplitWarps * Memory::kWarpBytes;
  load_queries<Element, kDim, kRows, kSplitWarps * kLanes>(args, s, head, first_query, num_queries, is_aligned,
                                                           query_rows);
  __syncthreads();
  uint32_t queries[kGroups][kSteps][2];
  int visible[kGroups][2];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t b[4];
      load_matrices(shared_address(query_rows) + swizzled<kDim>(g * kGroupRows + lane % 8, 2 * step + lane / 8), b);
      queries[g][step][0] = b[0];
      queries[g][step][1] = b[1];
      queries[g][step + 1][0] = b[2];
      queries[g][step + 1][1] = b[3];
    }
    for (int i = 0; i < 2; ++i) {
      const int column = g * kGroupRows + lane % 4 * 2 + i;
      visible[g][i] = column < num_queries ? min(end, visible_rows(s, (first_query + column) / G)) : 0;
    }
  }

  const float scale = args.scale * kLog2E;
  float most[kGroups][2];
  float sums[kGroups][2] = {};
  float values[kGroups][kSteps][4] = {};
  for (int g = 0; g < kGroups; ++g) most[g][0] = most[g][1] = -INFINITY;

  int slot = 0;  // of the keys of this tile
  const auto slot_offset = [&](int ahead) {
    const int i = slot + ahead;
    return static_cast<uint32_t>((i >= kSplitSlots ? i - kSplitSlots : i) * Memory::kSlotBytes);
  };
  // A tile that has come, ready for products.
  const auto tile_at = [&](uint32_t offset) {
    if constexpr (!kIsInt8) return ring + offset;
    widen_tile<Element, kDim>(ring_memory + offset, widened);
    __syncwarp();
    return widened;
  };
  for (int tile = begin + warp * kTileRows; tile < end; tile += kSplitWarps * kTileRows) {
    // Keys. The ring's third slot gets those of the next tile.
    reader.advance();
    __syncwarp();
    reader.copy(all_keys, ring + slot_offset(2));
    commit_copies();
    wait_copies<2>();
    __syncwarp();
    float scores[kGroups][2][4] = {};  // two sums each, because one product waits for the one before it
    {
      const uint32_t keys = tile_at(slot_offset(0));
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        load_matrices(keys + swizzled<kDim>(lane % 16, 2 * step + lane / 16), a);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          multiply_add<Element>(scores[g][step % 2], a, queries[g][step][0], queries[g][step][1]);
        }
      }
    }

    // Weights, as right sides of V^T P^T.
    uint32_t weights[kGroups][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = tile + lane / 4 + i / 2 * 8;
        p[i] = row < visible[g][i % 2] ? (scores[g][0][i] + scores[g][1][i]) * scale : -INFINITY;
      }
      float factor[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float m = fmaxf(p[i], p[i + 2]);
#pragma unroll
        for (int other = 4; other < kLanes; other *= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, other));
        m = fmaxf(m, most[g][i]);
        const float base = m == -INFINITY ? 0.0f : m;
        factor[i] = exp2_fast(most[g][i] - base);
        most[g][i] = m;
        p[i] = exp2_fast(p[i] - base);
        p[i + 2] = exp2_fast(p[i + 2] - base);
        sums[g][i] = sums[g][i] * factor[i] + (p[i] + p[i + 2]);
      }
      if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) values[g][step][i] *= factor[i % 2];
        }
      }
      weights[g][0] = transpose_matrix(packed<Element>(p[0], p[1]));
      weights[g][1] = transpose_matrix(packed<Element>(p[2], p[3]));
    }

    // Values. The slot of the keys is free for those of the next tile.
    __syncwarp();
    reader.copy(all_values, ring + slot_offset(0));
    commit_copies();
    wait_copies<2>();
    __syncwarp();
    const uint32_t rows = tile_at(slot_offset(1));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrices_transposed(rows + swizzled<kDim>(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2), a);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) multiply_add<Element>(values[g][step], a, weights[g][0], weights[g][1]);
    }
    slot = slot == 0 ? 2 : slot - 1;
  }

  // The results of the warps, [warp, query, column], with m and l behind each row.
  constexpr int kStride = kDim + 4;  // spreads the rows over the banks
  auto* joined = reinterpret_cast<float*>(shared);
  float* most_of = joined + kSplitWarps * kRows * kStride;
  float* sum_of = most_of + kSplitWarps * kRows;
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[g][i];
#pragma unroll
      for (int other = 4; other < kLanes; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
      const int query = warp * kRows + g * kGroupRows + lane % 4 * 2 + i;
      if (lane / 4 == 0) {
        most_of[query] = most[g][i];
        sum_of[query] = sum;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        joined[query * kStride + step * 16 + lane / 4] = values[g][step][i];
        joined[query * kStride + step * 16 + lane / 4 + 8] = values[g][step][i + 2];
      }
    }
  }
  __syncthreads();
  for (int query = warp; query < num_queries; query += kSplitWarps) {
    float m = most_of[query];
    for (int w = 1; w < kSplitWarps; ++w) m = fmaxf(m, most_of[w * kRows + query]);
    const float base = m == -INFINITY ? 0.0f : m;
    float factor[kSplitWarps];
    float sum = 0.0f;
    for (int w = 0; w < kSplitWarps; ++w) {
      factor[w] = exp2_fast(most_of[w * kRows + query] - base);
      sum += factor[w] * sum_of[w * kRows + query];
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum;  // NaN stays
    const int row = first_query + query;
    const int token = row / G;
    const int64_t query_head = head * G + row % G;
    const int64_t result = results.index(args, n, token, query_head) + chunk;
    Element* out = row_of<Element>(args.out, s.begin + token, query_head);
    for (int column = lane; column < args.D; column += kLanes) {
      float value = 0.0f;
      for (int w = 0; w < kSplitWarps; ++w) value += factor[w] * joined[(w * kRows + query) * kStride + column];
      value *= inverse;
      if (is_whole) {
        out[column] = narrowed<Element>(value);
      } else {
        results.values[result * args.D + column] = value;
      }
    }
    if (lane == 0 && !is_whole) results.log2s[result] = sum == 0.0f ? -INFINITY : m + log2f(sum);
  }
}

}  // namespace xgdn::kernel::cuda
