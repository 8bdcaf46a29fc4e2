// SPDX-License-Identifier: Apache-2.0
// The largest number of each row and its place, in the order of logit_keys.cuh.
//
// A cluster of blocks has a row, each thread every so many neighbours.
#include "core/kernels/cuda/largest_logits.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/logit_keys.cuh"

namespace xgdn::kernel::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCluster = 8;

// kIsWhole: rows are aligned to 16 bytes.
template <bool kIsWhole>
__global__ void __launch_bounds__(kThreads) largest_kernel(const LargestLogitsArgs args) {
  __shared__ uint64_t of_warps[kWarps];
  __shared__ uint64_t of_blocks[kCluster];
#if __CUDA_ARCH__ >= 900
  const auto cluster = cg::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
#else
  constexpr int blocks = 1, rank = 0;
#endif
  const float* const row = args.logits + blockIdx.y * args.V;
  const auto V = static_cast<uint32_t>(args.V);
  const uint32_t first = rank * kThreads + threadIdx.x, step = blocks * kThreads;
  begin_overlapped();

  uint64_t best = 0;
  for_each_key<kIsWhole>(row, V, first, step, [&](uint64_t key) { best = max(best, key); });
  best = best_of_lanes<32>(best);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) best = best_of_lanes<32>(of_warps[threadIdx.x]);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) *cluster.map_shared_rank(of_blocks + rank, 0) = best;
  cluster.sync();
#else
  if (threadIdx.x == 0) of_blocks[0] = best;
#endif
  if (rank != 0 || threadIdx.x != 0) return;
  for (int i = 0; i < blocks; ++i) best = max(best, of_blocks[i]);
  const uint32_t place = token_of(best);
  args.largest[blockIdx.y] = row[place];
  args.tokens[blockIdx.y] = static_cast<int32_t>(place);
}

static_assert(kWarps == 32);

}  // namespace

void largest_logits(const LargestLogitsArgs& args, cudaStream_t stream) {
  constexpr int64_t kMostRows = 65535;  // of a launch
  const int cluster = has_clusters() ? kCluster : 1;
  const bool is_whole = args.V % 4 == 0 && reinterpret_cast<uintptr_t>(args.logits) % 16 == 0;
  for (int64_t begin = 0; begin < args.R; begin += kMostRows) {
    LargestLogitsArgs rows = args;
    rows.R = std::min(args.R - begin, kMostRows);
    rows.logits += begin * args.V, rows.largest += begin, rows.tokens += begin;
    launch_overlapping(is_whole ? largest_kernel<true> : largest_kernel<false>,
                       dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(rows.R)), kThreads,
                       /*shared_bytes=*/0, cluster, stream, rows);
  }
  check_launch("largest_logits");
}

}  // namespace xgdn::kernel::cuda
