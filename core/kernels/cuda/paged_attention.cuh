// SPDX-License-Identifier: Apache-2.0
// What the kernels of paged attention share.
//
// The query heads that read one key head, of all tokens of a sequence, are its rows: row r is head r % G of token r /
// G, with G = HQ / HKV. A sequence of few tokens has its context split into chunks that are worked on side by side;
// their sizes, and so the bits of a result, depend on its own context alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/paged_attention.h"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = ~0u;
inline constexpr int kSplitTokens = 8;      // a sequence of more tokens is not split
inline constexpr int kMaxChunks = 64;       // of a context
inline constexpr int kMinChunkRows = 128;   // but for the last one
inline constexpr int kMaxChunkRows = 2048;  // but where a context would have too many
inline constexpr float kLog2E = 1.4426950408889634f;

/// What the chunks of split sequences leave for their sum: the result of each and the logarithm of its weight.
struct ChunkResults {
  int max_tokens = 0;       // of a split sequence
  int max_chunks = 0;       // of a context
  int chunks_at_once = 0;   // of one context, so that all together fill the device
  float* values = nullptr;  // [N, max_tokens, HQ, max_chunks, D]
  float* log2s = nullptr;   // [N, max_tokens, HQ, max_chunks]  base 2; -inf: the chunk has no row that is seen

  /// The first chunk of a row.
  __device__ int64_t index(const PagedAttentionArgs& args, int64_t sequence, int token, int64_t head) const {
    return ((sequence * max_tokens + token) * args.HQ + head) * max_chunks;
  }
};

/// A sequence of a call.
struct AttendedSequence {
  int begin = 0;    // its first token
  int len = 0;      // tokens
  int context = 0;  // rows of the cache
};

__device__ inline AttendedSequence sequence_of(const PagedAttentionArgs& args, int64_t n) {
  const int begin = args.cu_seqlens[n];
  return {.begin = begin, .len = args.cu_seqlens[n + 1] - begin, .context = args.context_lens[n]};
}

__device__ inline bool is_split(const AttendedSequence& s) {
  return s.len <= kSplitTokens;
}

/// Rows of the cache in each chunk but the last: as even as may be, but neither so few that starting costs more than
/// reading, nor so many that the chunks of one long context are what all wait for.
__device__ inline int chunk_rows(const ChunkResults& results, int context) {
  constexpr int kUnit = 64;
  const int even =
      min(max((context + results.chunks_at_once - 1) / results.chunks_at_once, kMinChunkRows), kMaxChunkRows);
  const int rows = max(even, (context + kMaxChunks - 1) / kMaxChunks);
  return (rows + kUnit - 1) / kUnit * kUnit;
}

/// Bytes of a key head's row in a cache: D elements, or D codes and their scale.
template <class Element, bool kIsInt8>
__device__ inline int64_t cache_row_bytes(const PagedAttentionArgs& args) {
  return kIsInt8 ? args.D + static_cast<int64_t>(sizeof(float)) : args.D * static_cast<int64_t>(sizeof(Element));
}

/// Where a row of the context lies in the cache, in rows.
__device__ inline int64_t cache_row(const PagedAttentionArgs& args, const int32_t* blocks, int row) {
  const auto block_rows = static_cast<uint32_t>(args.B);
  const uint32_t block = static_cast<uint32_t>(row) / block_rows;
  return static_cast<int64_t>(blocks[block]) * args.B + (static_cast<uint32_t>(row) - block * block_rows);
}

/// Rows of the context that a token sees.
__device__ inline int visible_rows(const AttendedSequence& s, int token) {
  return s.context - (s.len - 1 - token);
}

/// Byte of 16-byte piece `piece` of row `row` in a tile: pieces are exchanged so that neighbouring rows differ in
/// banks.
template <int kDim>
__device__ inline uint32_t swizzled(int row, int piece) {
  constexpr int kPieces = kDim / 8;
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  return static_cast<uint32_t>((row * kPieces + (piece ^ (row & kMask))) * 16);
}

/// 8 elements of a row of queries; `is_aligned`: to 16 bytes.
template <class Element>
__device__ inline uint4 load_8(const Element* x, bool is_aligned) {
  if (is_aligned) return *reinterpret_cast<const uint4*>(x);
  const auto* bits = reinterpret_cast<const uint16_t*>(x);
  const auto pair = [bits](int i) { return bits[i] | static_cast<uint32_t>(bits[i + 1]) << 16; };
  return {pair(0), pair(2), pair(4), pair(6)};
}

/// Brings rows of queries to shared memory, swizzled; zeros behind the last one and behind D.
template <class Element, int kDim, int kRows, int kThreads>
__device__ inline void load_queries(const PagedAttentionArgs& args, const AttendedSequence& s, int64_t head, int first,
                                    int count, bool is_aligned, char* to) {
  constexpr int kPieces = kDim / 8;
  const int G = static_cast<int>(args.HQ / args.HKV);
#pragma unroll
  for (int index = threadIdx.x; index < kRows * kPieces; index += kThreads) {
    const int query = index / kPieces;
    const int piece = index % kPieces;
    uint4 x = {};
    if (query < count && piece * 8 < args.D) {
      const int row = first + query;
      x = load_8(row_of<Element>(args.q, s.begin + row / G, head * G + row % G) + piece * 8, is_aligned);
    }
    *reinterpret_cast<uint4*>(to + swizzled<kDim>(query, piece)) = x;
  }
}

/// Rows of queries that a block of threads works on, of one sequence that is not split.
struct QueryTile {
  int64_t sequence = -1;  // -1: there is no such tile
  int first = 0;          // row
};

/// Tiles of `rows` rows that sequences which are not split have at most.
inline int64_t max_query_tiles(const PagedAttentionArgs& args, int rows) {
  const int64_t sequences = args.T / (kSplitTokens + 1) < args.N ? args.T / (kSplitTokens + 1) : args.N;
  return args.T * (args.HQ / args.HKV) / rows + sequences;
}

/// Finds a tile by its number, counted from the last rows of each sequence because those see most. All lanes of a warp
/// call it together.
__device__ inline QueryTile query_tile(const PagedAttentionArgs& args, int64_t index, int rows) {
  const int lane = threadIdx.x % kLanes;
  const int64_t G = args.HQ / args.HKV;
  for (int64_t first = 0; first < args.N; first += kLanes) {
    const int64_t n = first + lane;
    const int64_t len = n < args.N ? args.cu_seqlens[n + 1] - args.cu_seqlens[n] : 0;
    const int64_t tiles = len <= kSplitTokens ? 0 : (len * G + rows - 1) / rows;
    int64_t end = tiles;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    const unsigned behind = __ballot_sync(kAllLanes, end > index);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      const int64_t last = __shfl_sync(kAllLanes, end, found) - 1;
      return {.sequence = first + found, .first = static_cast<int>(last - index) * rows};
    }
    index -= __shfl_sync(kAllLanes, end, kLanes - 1);
  }
  return {};
}

/// How blocks of many queries leave their results. Few tiles of queries before a long context share it between blocks.
struct TileCall {
  bool is_aligned = false;  // rows of q and of out, to 16 bytes
  int shares = 1;           // of the context of a tile
  float* values = nullptr;  // [T, HQ, shares, D]  the result of each share; shares > 1
  float* log2s = nullptr;   // [T, HQ, shares]     the logarithm of its weight, base 2; -inf: no row that is seen
};

/// Rows [begin, end) of the context.
struct ContextShare {
  int begin = 0;
  int end = 0;
};

/// Part of the rows before `end`, in whole tiles of `rows` rows.
__device__ inline ContextShare share_of(const TileCall& call, int end, int rows, int share) {
  const int tiles = (max(end, 0) + rows - 1) / rows;
  const int begin = (tiles + call.shares - 1) / call.shares * rows * share;
  return {.begin = begin, .end = min(end, begin + (tiles + call.shares - 1) / call.shares * rows)};
}

/// Writes the result of a row of queries from the sums of values: columns 8 j + 2 (lane % 4), + 1 of elements 2 i and
/// 2 i + 1, over `sum`. log2_base: the logarithm of the factor that the sums lack.
template <class Element, int kPieces>
__device__ inline void store_query(const PagedAttentionArgs& args, const TileCall& call, const AttendedSequence& s,
                                   int64_t key_head, int row, int share, const float (&values)[kPieces][4], int i,
                                   float sum, float log2_base) {
  const int lane = threadIdx.x % kLanes;
  const int G = static_cast<int>(args.HQ / args.HKV);
  const int64_t token = s.begin + row / G;
  const int64_t head = key_head * G + row % G;
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t result = (token * args.HQ + head) * call.shares + share;
  Element* out = row_of<Element>(args.out, token, head);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = j * 8 + lane % 4 * 2;
    if (column >= args.D) break;
    const float first = values[j][2 * i] * inverse;
    const float second = values[j][2 * i + 1] * inverse;
    if (call.shares > 1) {
      *reinterpret_cast<float2*>(call.values + result * args.D + column) = make_float2(first, second);
    } else if (call.is_aligned) {
      *reinterpret_cast<uint32_t*>(out + column) = packed<Element>(first, second);
    } else {
      out[column] = narrowed<Element>(first);
      out[column + 1] = narrowed<Element>(second);
    }
  }
  if (call.shares > 1 && lane % 4 == 0) call.log2s[result] = sum == 0.0f ? -INFINITY : log2_base + log2f(sum);
}

}  // namespace xgdn::kernel::cuda
