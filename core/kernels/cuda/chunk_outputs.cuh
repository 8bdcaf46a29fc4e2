// SPDX-License-Identifier: Apache-2.0
// How the outputs of a chunk leave chunk_scan.cuh: 16 columns of V of each warp, transposed, by way of a panel of the
// warp group's in shared memory.
#pragma once

#include "core/kernels/cuda/chunk_stages.cuh"

namespace xgdn::kernel::cuda {

/// What row of matrix lane / 8 a lane names of the four 8 x 8 matrices of tokens 16 i to 16 i + 15 and the warp's 16
/// columns, in a panel with rows of tokens.
__device__ inline uint32_t columns_address(const char* panel, int warp, int i) {
  const int lane = threadIdx.x % 32;
  return shared_address(panel) + piece_offset(i * 16 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2);
}

/// A thread's outputs of a chunk, two tokens of the out's type each: [tile of 8 tokens][row g or g + 8].
using PackedOutputs = uint32_t[8][2];

/// (S Q^T) out + U^T P^T.
__device__ inline void add_outputs(float (&sq)[8][4], const float2 (&out)[8], const float (&up)[8][4]) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float(&add)[4] = up[opposite_tile(tile)];
    sq[tile][0] = fmaf(sq[tile][0], out[tile].x, add[0]), sq[tile][1] = fmaf(sq[tile][1], out[tile].y, add[1]);
    sq[tile][2] = fmaf(sq[tile][2], out[tile].x, add[2]), sq[tile][3] = fmaf(sq[tile][3], out[tile].y, add[3]);
  }
}

__device__ inline void pack_outputs(DType dtype, const float (&o)[8][4], PackedOutputs& packed) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = o[tile][2 * half], second = o[tile][2 * half + 1];
      if (dtype == DType::kFloat16) {
        const __half2 pair = __floats2half2_rn(first, second);
        packed[tile][half] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        packed[tile][half] = pack_bf16(first, second);
      }
    }
  }
}

/// A warp's outputs to its group's panel, with rows of tokens. The group's threads call together.
__device__ inline void stage_outputs(const GroupPart& part, const PackedOutputs& packed, char* panel) {
  sync_group(part.group);  // the chunk before has left the panel
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t x[4] = {packed[2 * i][0], packed[2 * i][1], packed[2 * i + 1][0], packed[2 * i + 1][1]};
    store_matrices_transposed(columns_address(panel, part.warp, i), x);
  }
  fence_shared_memory();
  sync_group(part.group);
}

/// Sends a full chunk's outputs on their way without a branch, for the next chunk's product is under way. Nothing
/// leaves where c < 0.
__device__ inline void store_box_of_outputs(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                            int c, const PackedOutputs& packed, char* panel) {
  wait_stores_read();
  stage_outputs(part, packed, panel);
  const int column = static_cast<int>(item.column) + part.group * kGroupRows;
  store_box(kernel.out_map, column, static_cast<int>(item.head), static_cast<int>(item.token_of(c)),
            shared_address(panel), threadIdx.x % kGroupThreads == 0 && c >= 0);
}

/// Any chunk's outputs, of two bytes each. The group's threads call together.
__device__ inline void store_outputs(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part, int c,
                                     const PackedOutputs& packed, char* panel) {
  const OutRows& rows = kernel.args.out;
  const int thread = threadIdx.x % kGroupThreads;
  const int count = item.count_of(c);
  const int64_t column = item.column + part.group * kGroupRows + thread % 8 * 8;
  stage_outputs(part, packed, panel);
  for (int row = thread / 8; row < count; row += kGroupThreads / 8) {
    *reinterpret_cast<uint4*>(row_of(rows, item.token_of(c) + row, item.head) + column * 2) =
        *reinterpret_cast<const uint4*>(panel + piece_offset(row, thread % 8));
  }
}

/// Any chunk's outputs of any type, one by one.
__device__ inline void store_each_output(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part, int c,
                                         const float (&o)[8][4]) {
  const OutRows& rows = kernel.args.out;
  const int lane = threadIdx.x % 32;
  const int count = item.count_of(c);
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = tile * 8 + lane % 4 * 2 + i % 2;
      if (row >= count) continue;
      char* to = row_of(rows, item.token_of(c) + row, item.head);
      store_scalar(rows.dtype, to, part.column + lane / 4 + i / 2 * 8, o[tile][i]);
    }
  }
}

__device__ inline void clear_outputs(const OutRows& rows, const ScanItem& item, int64_t column) {
  const int lane = threadIdx.x % 32;
  for (int64_t token = item.begin + lane / 16; token < item.end; token += 2) {
    store_scalar(rows.dtype, row_of(rows, token, item.head), column + lane % 16, 0.0f);
  }
}

}  // namespace xgdn::kernel::cuda
