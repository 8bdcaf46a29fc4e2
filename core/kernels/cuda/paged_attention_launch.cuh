// SPDX-License-Identifier: Apache-2.0
// The launches of paged attention, from what the host knows: the chunks of sequences of few tokens, the sum of those
// chunks, tiles of queries of sequences of many tokens, and their sum where blocks share a context. Each kernel leaves
// alone what is another's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/paged_attention.cuh"
#include "core/kernels/cuda/paged_attention_f32.cuh"
#include "core/kernels/cuda/paged_attention_hopper.cuh"
#include "core/kernels/cuda/paged_attention_prefill.cuh"
#include "core/kernels/cuda/paged_attention_split.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kSumThreads = 256;
inline constexpr int kWantedChunks = 256;  // of all contexts and key heads: two blocks on each multiprocessor
inline constexpr int kQueryRows = 128;     // of queries, in each kernel for many tokens on tensor cores
inline constexpr int kWantedBlocks = 128;  // of these kernels
inline constexpr int kMaxShares = 8;       // of a context
inline constexpr int kMinShareRows = 512;  // of the longest one
inline constexpr int kSumWarps = kSumThreads / kLanes;

inline ChunkResults chunk_results(const PagedAttentionArgs& args) {
  ChunkResults results;
  results.max_tokens = static_cast<int>(std::min<int64_t>(args.max_len, kSplitTokens));
  results.chunks_at_once =
      static_cast<int>(std::max<int64_t>(kWantedChunks / std::max<int64_t>(args.N * args.HKV, 1), 1));
  const int64_t rows = args.M * args.B;
  const int64_t most = std::max<int64_t>(results.chunks_at_once, ceil_div(rows, kMaxChunkRows));
  results.max_chunks = static_cast<int>(
      std::clamp<int64_t>(std::min<int64_t>(most, kMaxChunks), 1, std::max<int64_t>(ceil_div(rows, kMinChunkRows), 1)));
  results.values = static_cast<float*>(args.workspace);
  if (results.values != nullptr) {
    results.log2s = results.values + args.N * results.max_tokens * args.HQ * results.max_chunks * args.D;
  }
  return results;
}

// out = sum over the chunks of 2^(log2 of its weight) times its result, over the sum of the weights. A block has a row.
template <class Element>
__global__ void __launch_bounds__(kSumThreads) sum_chunks(const PagedAttentionArgs args, const ChunkResults results) {
  const int64_t head = blockIdx.x % args.HQ;
  const int token = static_cast<int>(blockIdx.x / args.HQ % results.max_tokens);
  const int64_t n = blockIdx.x / args.HQ / results.max_tokens;
  let_next_kernel_launch();
  const AttendedSequence s = sequence_of(args, n);
  wait_for_kernel_before();
  const int rows = chunk_rows(results, s.context);
  if (!is_split(s) || token >= s.len || s.context <= rows) return;
  const int num_chunks = (s.context + rows - 1) / rows;
  const int64_t first = results.index(args, n, token, head);

  __shared__ float weights[kMaxChunks];
  __shared__ float4 sums[kSumThreads];
  for (int i = threadIdx.x; i < num_chunks; i += kSumThreads) weights[i] = results.log2s[first + i];
  __syncthreads();
  float most = -INFINITY;
  for (int i = 0; i < num_chunks; ++i) most = fmaxf(most, weights[i]);
  float total = 0.0f;
  for (int i = 0; i < num_chunks; ++i) total += exp2f(weights[i] - most);

  const int threads = static_cast<int>(args.D / 4);  // of a chunk's result
  const int groups = kSumThreads / threads;          // of chunks that are summed side by side
  const int group = threadIdx.x / threads;
  const int column = threadIdx.x % threads * 4;
  float4 sum = {};
  if (group < groups && most > -INFINITY) {
#pragma unroll 4
    for (int i = group; i < num_chunks; i += groups) {
      const float weight = exp2f(weights[i] - most) / total;
      const auto x = *reinterpret_cast<const float4*>(results.values + (first + i) * args.D + column);
      sum = {fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z), fmaf(weight, x.w, sum.w)};
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0) return;
  for (int g = 1; g < groups; ++g) {
    const float4 x = sums[g * threads + threadIdx.x];
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  Element* out = row_of<Element>(args.out, s.begin + token, head) + column;
  out[0] = narrowed<Element>(sum.x);
  out[1] = narrowed<Element>(sum.y);
  out[2] = narrowed<Element>(sum.z);
  out[3] = narrowed<Element>(sum.w);
}

// The same for the shares of tiles of queries. Blocks: (tile and key head, 8 rows), a warp has a row.
template <class Element>
__global__ void __launch_bounds__(kSumThreads) sum_shares(const PagedAttentionArgs args, const TileCall call) {
  begin_overlapped();
  const QueryTile tile = query_tile(args, blockIdx.x / args.HKV, kQueryRows);
  if (tile.sequence < 0) return;
  const int lane = threadIdx.x % kLanes;
  const AttendedSequence s = sequence_of(args, tile.sequence);
  const int G = static_cast<int>(args.HQ / args.HKV);
  const int row = tile.first + static_cast<int>(blockIdx.y * kSumWarps + threadIdx.x / kLanes);
  if (row >= s.len * G) return;
  const int64_t token = s.begin + row / G;
  const int64_t head = static_cast<int64_t>(blockIdx.x % args.HKV) * G + row % G;
  const int64_t first = (token * args.HQ + head) * call.shares;
  float most = -INFINITY;
  for (int i = 0; i < call.shares; ++i) most = fmaxf(most, call.log2s[first + i]);
  const float base = most == -INFINITY ? 0.0f : most;
  float total = 0.0f;
  for (int i = 0; i < call.shares; ++i) total += exp2f(call.log2s[first + i] - base);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  Element* out = row_of<Element>(args.out, token, head);
  for (int column = lane; column < args.D; column += kLanes) {
    float sum = 0.0f;
    for (int i = 0; i < call.shares; ++i) {
      const float weight = exp2f(call.log2s[first + i] - base) * inverse;
      sum = fmaf(weight, call.values[(first + i) * args.D + column], sum);
    }
    out[column] = narrowed<Element>(sum);
  }
}

// Hopper alone has them; its successors have others.
inline bool has_warp_group_products() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9;
}

inline bool has_aligned_rows(const PagedAttentionArgs& args) {
  return is_aligned(args.q) && is_aligned(args.out);
}

inline TileCall tile_call(const PagedAttentionArgs& args) {
  TileCall call = {.is_aligned = has_aligned_rows(args)};
  if (args.max_len <= kSplitTokens || args.q.dtype == DType::kFloat32) return call;
  const int64_t blocks = max_query_tiles(args, kQueryRows) * args.HKV;
  const int64_t most = std::clamp<int64_t>(args.M * args.B / kMinShareRows, 1, kMaxShares);
  call.shares = static_cast<int>(std::clamp<int64_t>(ceil_div(kWantedBlocks, std::max<int64_t>(blocks, 1)), 1, most));
  call.values = static_cast<float*>(args.workspace);
  if (call.values != nullptr) call.log2s = call.values + args.T * args.HQ * call.shares * args.D;
  return call;
}

template <class Last>
void launch(void (*kernel)(PagedAttentionArgs, Last), dim3 grid, int threads, int shared_bytes,
            const PagedAttentionArgs& args, const Last& last, cudaStream_t stream) {
  launch_overlapping(kernel, grid, threads, static_cast<size_t>(shared_bytes), /*cluster=*/1, stream, args, last);
  check_launch("paged_attention");
}

template <class Element, int kDim, bool kIsInt8>
void launch_tiles(const PagedAttentionArgs& args, cudaStream_t stream) {
  const TileCall call = tile_call(args);
  const auto blocks = static_cast<unsigned>(max_query_tiles(args, kQueryRows) * args.HKV);
  const dim3 grid(blocks, static_cast<unsigned>(call.shares));
  const auto run = [&](auto kernel, auto tiles) {
    using Tiles = decltype(tiles);
    static_assert(Tiles::kRows == kQueryRows);
    launch(kernel, grid, Tiles::kThreads, Tiles::kSharedBytes, args, call, stream);
  };
  if constexpr (kDim >= HopperTiles<kDim>::kBlockColumns) {
    if (has_warp_group_products()) {
      run(attend_prefill_hopper<Element, kDim, kIsInt8>, HopperTiles<kDim>());
    } else {
      run(attend_prefill<Element, kDim, kIsInt8>, PrefillTiles<kDim>());
    }
  } else {
    run(attend_prefill<Element, kDim, kIsInt8>, PrefillTiles<kDim>());
  }
  if (call.shares > 1) {
    launch(sum_shares<Element>, dim3(blocks, kQueryRows / kSumWarps), kSumThreads, 0, args, call, stream);
  }
}

template <class Element, int kDim, bool kIsInt8>
void attend_rows(const PagedAttentionArgs& args, cudaStream_t stream) {
  const ChunkResults results = chunk_results(args);
  const auto pairs = static_cast<unsigned>(args.N * args.HKV);
  const auto chunks = static_cast<unsigned>(results.max_chunks);
  const int64_t queries = results.max_tokens * (args.HQ / args.HKV);
  const bool has_long = args.max_len > kSplitTokens;
  // No sequence is shorter than what is left by the others.
  const bool has_short = args.T - (args.N - 1) * args.max_len <= kSplitTokens;
  constexpr bool kIsF32 = std::is_same_v<Element, float>;
  if (has_short) {
    if constexpr (kIsF32) {
      const dim3 grid(pairs, static_cast<unsigned>(ceil_div(queries, kF32Warps)), chunks);
      launch(attend_f32<kDim, true, kIsInt8>, grid, kF32Warps * kLanes, f32_shared_bytes<kDim>(), args, results,
             stream);
    } else {
      const auto launch_split = [&](auto groups) {
        constexpr int kGroups = decltype(groups)::value;
        const dim3 grid(pairs, static_cast<unsigned>(ceil_div(queries, kGroups * kGroupRows)), chunks);
        launch(attend_split<Element, kDim, kGroups, kIsInt8>, grid, kSplitWarps * kLanes,
               SplitMemory<kDim, kGroups, kIsInt8>::kBytes, args, SplitCall{results, has_aligned_rows(args)}, stream);
      };
      queries <= kGroupRows ? launch_split(std::integral_constant<int, 1>())
                            : launch_split(std::integral_constant<int, 2>());
    }
    if (results.max_chunks > 1) {
      const dim3 rows(static_cast<unsigned>(args.N * results.max_tokens * args.HQ));
      launch(sum_chunks<Element>, rows, kSumThreads, 0, args, results, stream);
    }
  }
  if (has_long) {
    if constexpr (kIsF32) {
      const dim3 tiles(static_cast<unsigned>(max_query_tiles(args, kF32Warps) * args.HKV));
      launch(attend_f32<kDim, false, kIsInt8>, tiles, kF32Warps * kLanes, f32_shared_bytes<kDim>(), args, results,
             stream);
    } else {
      launch_tiles<Element, kDim, kIsInt8>(args, stream);
    }
  }
}

/// paged_attention of either kind of rows. Each kind is compiled by itself.
template <bool kIsInt8>
void attend(const PagedAttentionArgs& args, cudaStream_t stream) {
  with_element(args.q.dtype, [&](auto element) {
    using Element = decltype(element);
    if (args.D <= 32) {
      attend_rows<Element, 32, kIsInt8>(args, stream);
    } else if (args.D <= 64) {
      attend_rows<Element, 64, kIsInt8>(args, stream);
    } else if (args.D <= 128) {
      attend_rows<Element, 128, kIsInt8>(args, stream);
    } else {
      attend_rows<Element, 256, kIsInt8>(args, stream);
    }
  });
}
extern template void attend<false>(const PagedAttentionArgs&, cudaStream_t);
extern template void attend<true>(const PagedAttentionArgs&, cudaStream_t);

}  // namespace xgdn::kernel::cuda
