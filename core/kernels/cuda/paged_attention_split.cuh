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

/// Shared memory of attend_split: a ring for each warp, of rows as they lie in the cache, with room behind each that
/// spreads them over the banks, and holds the scale of codes; behind a ring of codes the tile that is worked on; behind
/// all rings the queries.
template <int kDim, int kGroups, bool kIsInt8>
struct SplitMemory {
  static constexpr int kRowBytes = kDim * 2 + 16;  // of a tile ready for products
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  static constexpr int kSlotRowBytes = kIsInt8 ? kDim + 16 : kRowBytes;
  static constexpr int kSlotBytes = kTileRows * kSlotRowBytes;
  static constexpr int kWarpBytes = kSplitSlots * kSlotBytes + (kIsInt8 ? kTileBytes : 0);
  static constexpr int kQueryRows = kGroups * kGroupRows;
  static constexpr int kReadBytes = kSplitWarps * kWarpBytes + kQueryRows * kDim * 2;
  // At the end, the results of the warps: rows with 4 floats behind them, which spread them over the banks, and m and
  // l.
  static constexpr int kJoinedBytes = kSplitWarps * kQueryRows * (kDim + 4 + 2) * 4;
  static constexpr int kBytes = kReadBytes > kJoinedBytes ? kReadBytes : kJoinedBytes;
};

/// A warp's way through its tiles of one chunk, every kSplitWarps-th of them, and the ring that they come to: keys,
/// values, keys of the next tile and so on, each copied while the three before it are under way or read. On Hopper
/// rows of elements are bulk copies, one of each lane.
template <class Element, int kDim, bool kIsInt8>
class TileRing {
 public:
  using Memory = SplitMemory<kDim, 1, kIsInt8>;

  __device__ TileRing(const PagedAttentionArgs& args, const int32_t* blocks, int end, int first_row, char* memory,
                      uint64_t* barriers)
      : args_(args),
        blocks_(blocks),
        end_(end),
        next_row_(first_row),
        lane_(threadIdx.x % kLanes),
        head_bytes_(static_cast<uint32_t>(cache_row_bytes<Element, kIsInt8>(args))),
        row_bytes_(static_cast<uint32_t>(args.HKV) * head_bytes_),
        memory_(memory),
        barriers_(shared_address(barriers)) {
    fetch();
    if constexpr (kCopiesInBulk) {
      if (lane_ < kSplitSlots) init_barrier(barriers_ + lane_ * 8, 1);
      fence_shared_memory();
      clear_columns();
      __syncwarp();
    }
  }

  /// Goes to the next tile.
  __device__ void advance() {
    num_rows_ = min(max(end_ - next_row_, 0), kTileRows);
    row_ = fetched_;
    next_row_ += kSplitWarps * kTileRows;
    fetch();
  }

  /// Starts to bring the tile from `of_head`, the first row of a cache, to the second-level cache. Allowed ahead of the
  /// wait, as prefetch_line.
  __device__ void prefetch(const char* of_head) const {
    constexpr uint32_t kLineBytes = 128;
    if (row_ < 0) return;
    for (uint32_t byte = lane_ / kTileRows * kLineBytes; byte < head_bytes_; byte += kLanes / kTileRows * kLineBytes) {
      prefetch_line(address(of_head, row_) + byte);
    }
  }

  /// Begins to copy the tile from `of_head` to the next slot. Rows that there are not are zeros, or of keys anything.
  template <bool kAreKeys>
  __device__ void copy(const char* of_head) {
    char* const slot = memory_ + filled_ * Memory::kSlotBytes;
    if constexpr (kCopiesInBulk) {
      const uint32_t barrier = barriers_ + filled_ * 8;
      if (num_rows_ > 0 && lane_ == 0) arrive_and_expect(barrier, num_rows_ * head_bytes_);
      __syncwarp();
      if (lane_ < num_rows_) {
        copy_bulk(shared_address(slot) + lane_ * Memory::kRowBytes, address(of_head, row_), head_bytes_, barrier);
      }
      for (int row = num_rows_; !kAreKeys && num_rows_ > 0 && row < kTileRows; ++row) clear(slot, row, 0);
    } else {
      copy_pieces(of_head, shared_address(slot));
      commit_copies();
    }
    filled_ = filled_ + 1 == kSplitSlots ? 0 : filled_ + 1;
  }

  /// Waits for the oldest tile that is under way, one of three, and has it ready for products.
  __device__ uint32_t await() {
    char* const slot = memory_ + awaited_ * Memory::kSlotBytes;
    if constexpr (kCopiesInBulk) {
      wait_at(barriers_ + awaited_ * 8, parity_);
    } else {
      wait_copies<kSplitSlots - 1>();
    }
    __syncwarp();
    if (++awaited_ == kSplitSlots) awaited_ = 0, parity_ ^= 1;
    if constexpr (!kIsInt8) {
      return shared_address(slot);
    } else {
      const uint32_t tile = shared_address(memory_ + kSplitSlots * Memory::kSlotBytes);
      widen(slot, tile);
      __syncwarp();
      return tile;
    }
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr bool kCopiesInBulk = !kIsInt8;
#else
  static constexpr bool kCopiesInBulk = false;
#endif

  // Reads the table one tile ahead.
  __device__ void fetch() {
    const int row = next_row_ + lane_ % kTileRows;
    fetched_ = row < end_ ? static_cast<int>(cache_row(args_, blocks_, row)) : -1;
  }

  __device__ const char* address(const char* of_head, int cache_row) const {
    return of_head + static_cast<uint64_t>(static_cast<uint32_t>(cache_row)) * row_bytes_;
  }

  // Zeros behind column `first` of a row of elements.
  __device__ void clear(char* slot, int row, uint32_t first) const {
    for (uint32_t byte = first + lane_ * 16; byte < kDim * 2; byte += kLanes * 16) {
      *reinterpret_cast<uint4*>(slot + row * Memory::kRowBytes + byte) = {};
    }
  }

  // Behind D, where no copy writes.
  __device__ void clear_columns() const {
    if (head_bytes_ == kDim * 2) return;
    for (int row = 0; row < kSplitSlots * kTileRows; ++row) clear(memory_, row, head_bytes_);
  }

  __device__ void copy_pieces(const char* of_head, uint32_t to) const {
    constexpr int kPieceBytes = kIsInt8 ? 4 : 16;
    constexpr int kPieces = (kIsInt8 ? kDim : kDim * 2) / kPieceBytes;
#pragma unroll
    for (int i = 0; i < kTileRows * kPieces / kLanes; ++i) {
      const int index = i * kLanes + lane_;
      const int row = index / kPieces;
      const int byte = index % kPieces * kPieceBytes;
      const int cache_row = __shfl_sync(kAllLanes, row_, row);
      const bool is_valid = cache_row >= 0 && byte < (kIsInt8 ? args_.D : head_bytes_);
      const char* const from = is_valid ? address(of_head, cache_row) + byte : of_head;
      if constexpr (kIsInt8) {
        copy_word_async(to + row * Memory::kSlotRowBytes + byte, from, !is_valid);
      } else {
        copy_async(to + row * Memory::kSlotRowBytes + byte, from, !is_valid);
      }
    }
    if constexpr (kIsInt8) {
      if (lane_ < kTileRows) {
        copy_word_async(to + lane_ * Memory::kSlotRowBytes + kDim,
                        row_ >= 0 ? address(of_head, row_) + args_.D : of_head, row_ < 0);
      }
    }
  }

  // Codes of a tile as a tile of the dtype.
  __device__ void widen(const char* codes, uint32_t tile) const {
    constexpr int kPieces = kDim / 8;
#pragma unroll 8
    for (int i = 0; i < kTileRows * kPieces / kLanes; ++i) {
      const int index = i * kLanes + lane_;
      const char* row = codes + index / kPieces * Memory::kSlotRowBytes;
      const uint4 x = widened_codes<Element>(*reinterpret_cast<const uint2*>(row + index % kPieces * 8),
                                             *reinterpret_cast<const float*>(row + kDim));
      store_shared(tile + index / kPieces * Memory::kRowBytes + index % kPieces * 16, x);
    }
  }

  const PagedAttentionArgs& args_;
  const int32_t* blocks_;
  int end_;
  int next_row_;
  int lane_;
  uint32_t head_bytes_;
  uint32_t row_bytes_;
  char* memory_;
  uint32_t barriers_;
  int fetched_ = -1;
  int num_rows_ = 0;
  int row_ = -1;                  // of the cache, of lane % 16 of the tile; -1: behind the chunk
  int filled_ = 0, awaited_ = 0;  // slots
  uint32_t parity_ = 0;
};

struct SplitCall {
  ChunkResults results;
  bool is_aligned = false;  // rows of q and of out, to 16 bytes
};

template <class Element, int kDim, int kGroups, bool kIsInt8>
__global__ void __launch_bounds__(kSplitWarps* kLanes)
    attend_split(const PagedAttentionArgs args, const SplitCall call) {
  const auto& [results, is_aligned] = call;
  using Memory = SplitMemory<kDim, kGroups, kIsInt8>;
  constexpr int kRows = kGroups * kGroupRows;
  constexpr int kSteps = kDim / 16;
  const auto HKV = static_cast<uint32_t>(args.HKV);
  const int G = static_cast<int>(static_cast<uint32_t>(args.HQ) / HKV);
  const int64_t head = blockIdx.x % HKV;
  const int64_t n = blockIdx.x / HKV;
  const int first_query = blockIdx.y * kRows;
  const int chunk = blockIdx.z;

  let_next_kernel_launch();
  const AttendedSequence s = sequence_of(args, n);
  const int num_queries = min(kRows, s.len * G - first_query);
  const int rows_of_chunk = chunk_rows(results, s.context);
  const int begin = chunk * rows_of_chunk;
  if (!is_split(s) || num_queries <= 0 || (begin >= s.context && chunk > 0)) {
    wait_for_kernel_before();
    return;
  }
  const bool is_whole = s.context <= rows_of_chunk;
  const int end = min(s.context, begin + rows_of_chunk);

  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[kSplitWarps][kSplitSlots];
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  TileRing<Element, kDim, kIsInt8> ring(args, args.block_table + n * args.block_table_stride, end,
                                        begin + warp * kTileRows, shared + warp * Memory::kWarpBytes, barriers[warp]);
  const int64_t head_bytes = head * cache_row_bytes<Element, kIsInt8>(args);
  const char* all_keys = static_cast<const char*>(args.k) + head_bytes;
  const char* all_values = static_cast<const char*>(args.v) + head_bytes;
  ring.advance();
  ring.prefetch(all_keys);
  ring.prefetch(all_values);
  wait_for_kernel_before();
  ring.template copy<true>(all_keys);
  ring.template copy<false>(all_values);

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

  for (int tile = begin + warp * kTileRows; tile < end; tile += kSplitWarps * kTileRows) {
    // Keys. The ring's third slot gets those of the next tile.
    ring.advance();
    __syncwarp();
    ring.template copy<true>(all_keys);
    float scores[kGroups][2][4] = {};  // two sums each, because one product waits for the one before it
    {
      const uint32_t keys = ring.await();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        load_matrices(keys + lane % 16 * Memory::kRowBytes + (2 * step + lane / 16) * 16, a);
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
    ring.template copy<false>(all_values);
    const uint32_t rows = ring.await();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      load_matrices_transposed(rows + (lane % 8 + lane / 16 * 8) * Memory::kRowBytes + (2 * step + lane / 8 % 2) * 16,
                               a);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) multiply_add<Element>(values[g][step], a, weights[g][0], weights[g][1]);
    }
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
    for (int column = lane * 4; column < args.D; column += kLanes * 4) {
      float4 value = {};
      for (int w = 0; w < kSplitWarps; ++w) {
        const auto x = *reinterpret_cast<const float4*>(joined + (w * kRows + query) * kStride + column);
        value = {fmaf(factor[w], x.x, value.x), fmaf(factor[w], x.y, value.y), fmaf(factor[w], x.z, value.z),
                 fmaf(factor[w], x.w, value.w)};
      }
      value = {value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse};
      if (!is_whole) {
        *reinterpret_cast<float4*>(results.values + result * args.D + column) = value;
      } else if (is_aligned) {
        *reinterpret_cast<uint2*>(out + column) = {packed<Element>(value.x, value.y),
                                                   packed<Element>(value.z, value.w)};
      } else {
        out[column] = narrowed<Element>(value.x);
        out[column + 1] = narrowed<Element>(value.y);
        out[column + 2] = narrowed<Element>(value.z);
        out[column + 3] = narrowed<Element>(value.w);
      }
    }
    if (lane == 0 && !is_whole) results.log2s[result] = sum == 0.0f ? -INFINITY : m + log2f(sum);
  }
}

}  // namespace xgdn::kernel::cuda
