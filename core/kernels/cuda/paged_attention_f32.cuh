// SPDX-License-Identifier: Apache-2.0
// Attention of f32 elements, without tensor cores: a warp has a row of queries, a lane a row of the cache and, for the
// values, every 32nd column. Everything is f32.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/cache_codes.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/paged_attention.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kF32Warps = 8;  // and rows of queries
inline constexpr int kF32TileRows = kLanes;

template <int kDim>
constexpr int f32_stride() {
  return kDim + 4;  // spreads the rows over the banks
}
template <int kDim>
constexpr int f32_shared_bytes() {
  return (kF32Warps * kDim + 2 * kF32TileRows * f32_stride<kDim>()) * 4;
}

/// Four neighbours of a row of the cache.
template <bool kIsInt8>
__device__ inline float4 load_4(const char* row, int column, int64_t D) {
  if constexpr (!kIsInt8) return *reinterpret_cast<const float4*>(row + column * sizeof(float));
  const float scale = *reinterpret_cast<const float*>(row + D);
  const float4 x = widened_codes(*reinterpret_cast<const uint32_t*>(row + column));
  return {x.x * scale, x.y * scale, x.z * scale, x.w * scale};
}

/// Blocks: (sequence and key head, tile of rows, chunk) of split sequences, else (tile of rows and key head).
template <int kDim, bool kIsSplit, bool kIsInt8>
__global__ void __launch_bounds__(kF32Warps* kLanes)
    attend_f32(const PagedAttentionArgs args, const ChunkResults results) {
  constexpr int kStride = f32_stride<kDim>();
  constexpr int kColumns = kDim / kLanes;
  const int G = static_cast<int>(args.HQ / args.HKV);
  int64_t n = blockIdx.x / args.HKV;
  const int64_t head = blockIdx.x % args.HKV;
  int first_query = blockIdx.y * kF32Warps;
  begin_overlapped();
  if constexpr (!kIsSplit) {
    const QueryTile tile = query_tile(args, blockIdx.x / args.HKV, kF32Warps);
    if (tile.sequence < 0) return;
    n = tile.sequence;
    first_query = tile.first;
  }
  const AttendedSequence s = sequence_of(args, n);
  const int num_queries = min(kF32Warps, s.len * G - first_query);
  if (num_queries <= 0 || (kIsSplit && !is_split(s))) return;
  const int rows_of_chunk = kIsSplit ? chunk_rows(results, s.context) : max(s.context, 0);
  const int chunk = kIsSplit ? blockIdx.z : 0;
  const int begin = chunk * rows_of_chunk;
  if (begin >= s.context && chunk > 0) return;
  const bool is_whole = s.context <= rows_of_chunk;
  // No row of this tile sees more than the last one.
  const int end = min(min(s.context, begin + rows_of_chunk), visible_rows(s, (first_query + num_queries - 1) / G));

  extern __shared__ __align__(16) float f32_shared[];
  float* queries = f32_shared;
  float* keys = queries + kF32Warps * kDim;
  float* values = keys + kF32TileRows * kStride;
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int row = first_query + min(warp, num_queries - 1);
  const int token = row / G;
  const int64_t query_head = head * G + row % G;
  const float* q = row_of<float>(args.q, s.begin + token, query_head);
  for (int column = lane; column < kDim; column += kLanes) {
    queries[warp * kDim + column] = column < args.D ? q[column] : 0.0f;
  }
  const int visible = min(end, visible_rows(s, token));
  const float scale = args.scale * kLog2E;
  const int32_t* blocks = args.block_table + n * args.block_table_stride;
  const int64_t row_bytes = cache_row_bytes<float, kIsInt8>(args);

  float most = -INFINITY;
  float sum = 0.0f;
  float value[kColumns] = {};
  for (int tile = begin; tile < end; tile += kF32TileRows) {
    __syncthreads();
    for (int r = warp; r < kF32TileRows; r += kF32Warps) {
      const bool is_valid = tile + r < end;
      const int64_t offset = is_valid ? (cache_row(args, blocks, tile + r) * args.HKV + head) * row_bytes : 0;
      for (int column = lane * 4; column < kDim; column += kLanes * 4) {
        const bool is_read = is_valid && column < args.D;
        const float4 zero = {};
        *reinterpret_cast<float4*>(keys + r * kStride + column) =
            is_read ? load_4<kIsInt8>(static_cast<const char*>(args.k) + offset, column, args.D) : zero;
        *reinterpret_cast<float4*>(values + r * kStride + column) =
            is_read ? load_4<kIsInt8>(static_cast<const char*>(args.v) + offset, column, args.D) : zero;
      }
    }
    __syncthreads();
    float dot[4] = {};
    for (int column = 0; column < kDim; column += 4) {
      const auto k = *reinterpret_cast<const float4*>(keys + lane * kStride + column);
      const auto x = *reinterpret_cast<const float4*>(queries + warp * kDim + column);
      dot[0] = fmaf(k.x, x.x, dot[0]);
      dot[1] = fmaf(k.y, x.y, dot[1]);
      dot[2] = fmaf(k.z, x.z, dot[2]);
      dot[3] = fmaf(k.w, x.w, dot[3]);
    }
    const float score = tile + lane < visible ? ((dot[0] + dot[1]) + (dot[2] + dot[3])) * scale : -INFINITY;
    float m = score;
    for (int other = 1; other < kLanes; other *= 2) m = fmaxf(m, __shfl_xor_sync(kAllLanes, m, other));
    m = fmaxf(m, most);
    const float base = m == -INFINITY ? 0.0f : m;
    const float factor = exp2f(most - base);
    const float p = exp2f(score - base);
    most = m;
    sum = sum * factor + p;  // of this lane's rows
    for (int i = 0; i < kColumns; ++i) value[i] *= factor;
#pragma unroll 8
    for (int r = 0; r < kF32TileRows; ++r) {
      const float weight = __shfl_sync(kAllLanes, p, r);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) value[i] = fmaf(weight, values[r * kStride + i * kLanes + lane], value[i]);
    }
  }
  for (int other = 1; other < kLanes; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (warp >= num_queries) return;

  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t result = results.index(args, n, token, query_head) + chunk;
  float* out = row_of<float>(args.out, s.begin + token, query_head);
  if (kIsSplit && !is_whole) {
    out = results.values + result * args.D;
    if (lane == 0) results.log2s[result] = sum == 0.0f ? -INFINITY : most + log2f(sum);
  }
  for (int i = 0; i < kColumns; ++i) {
    if (i * kLanes + lane < args.D) out[i * kLanes + lane] = value[i] * inverse;
  }
}

}  // namespace xgdn::kernel::cuda
