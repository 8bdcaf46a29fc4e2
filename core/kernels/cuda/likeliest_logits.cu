// SPDX-License-Identifier: Apache-2.0
// The `count` largest numbers of each row and their places, in the order of logit_keys.cuh.
//
// A cluster of blocks has a row. Of the largest keys of 256 parts of the row, the one of number `count` bounds what is
// looked for from below. The keys from the bound on are collected by the first block, which sorts them: as a rule few
// more than are wanted. Where more come than it has room for, the one of number `count` of those that it has is a
// higher bound, above which there are fewer, and all begins again from there. What is found does not depend on which
// keys found room.
#include "core/kernels/cuda/likeliest_logits.h"

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
constexpr int kCluster = 8;
constexpr int kParts = 256;  // of a row
constexpr int kRoom = 2048;  // for keys
static_assert(kParts >= kMostFound && kRoom > kMostFound);
static_assert((kRoom & (kRoom - 1)) == 0);

struct Found {
  unsigned long long bound;
  int count;  // of keys from the bound on
  unsigned long long keys[kRoom];
};

// Descending; all threads of the block.
__device__ void sort_keys(unsigned long long* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = i / step * 2 * step + i % step;
        const int high = low + step;
        const bool descends = (low & run) == 0;
        const unsigned long long a = keys[low], b = keys[high];
        if ((a < b) == descends) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
  }
}

template <bool kIsWhole, int kBlocks>
__global__ void __launch_bounds__(kThreads) likeliest_kernel(const LikeliestLogitsArgs args) {
  __shared__ Found own;  // of the first block for all
#if __CUDA_ARCH__ >= 900
  const auto cluster = cg::this_cluster();
  const int rank = kBlocks == 1 ? 0 : static_cast<int>(cluster.block_rank());
  Found& found = kBlocks == 1 ? own : *cluster.map_shared_rank(&own, 0);
  const auto sync_all = [&] { kBlocks == 1 ? __syncthreads() : cluster.sync(); };
#else
  constexpr int rank = 0;
  Found& found = own;
  const auto sync_all = [] { __syncthreads(); };
#endif
  constexpr int kLanes = kThreads * kBlocks / kParts;  // of a part
  static_assert(kLanes <= 32 && 32 % kLanes == 0);
  const float* const row = args.logits + blockIdx.y * args.V;
  const auto V = static_cast<uint32_t>(args.V);
  const uint32_t first = rank * kThreads + threadIdx.x, step = kBlocks * kThreads;
  const int count = static_cast<int>(args.count);
  begin_overlapped();

  uint64_t best = 0;
  for_each_key<kIsWhole>(row, V, first, step, [&](uint64_t key) { best = max(best, key); });
  best = best_of_lanes<kLanes>(best);
  sync_all();  // all blocks are there
  if (threadIdx.x % kLanes == 0) found.keys[first / kLanes] = best;
  if (rank == 0 && threadIdx.x == 0) own.count = kParts;
  sync_all();
  for (;;) {
    if (rank == 0) {
      sort_keys(own.keys, min(own.count, kRoom));
      if (threadIdx.x == 0) own.bound = max(own.keys[count - 1], 1ull), own.count = 0;
    }
    sync_all();
    const unsigned long long bound = found.bound;
    for_each_key<kIsWhole>(row, V, first, step, [&](uint64_t key) {
      if (key < bound) return;
      const int place = atomicAdd(&found.count, 1);
      if (place < kRoom) found.keys[place] = key;
    });
    sync_all();
    const bool has_room = found.count <= kRoom;
    sync_all();  // before the count is changed, or the first block leaves
    if (has_room) break;
  }
  if (rank != 0) return;
  sort_keys(own.keys, own.count);
  int32_t* const out = args.found + static_cast<int64_t>(blockIdx.y) * 2 * count;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t token = token_of(own.keys[i]);
    out[i] = __float_as_int(row[token]);
    out[count + i] = static_cast<int32_t>(token);
  }
}

template <int kBlocks>
void launch(const LikeliestLogitsArgs& args, cudaStream_t stream) {
  const bool is_whole = args.V % 4 == 0 && reinterpret_cast<uintptr_t>(args.logits) % 16 == 0;
  launch_overlapping(is_whole ? likeliest_kernel<true, kBlocks> : likeliest_kernel<false, kBlocks>,
                     dim3(kBlocks, static_cast<unsigned>(args.R)), kThreads, /*shared_bytes=*/0, kBlocks, stream, args);
}

}  // namespace

void likeliest_logits(const LikeliestLogitsArgs& args, cudaStream_t stream) {
  constexpr int64_t kMostRows = 65535;  // of a launch
  for (int64_t begin = 0; begin < args.R; begin += kMostRows) {
    LikeliestLogitsArgs rows = args;
    rows.R = std::min(args.R - begin, kMostRows);
    rows.logits += begin * args.V, rows.found += begin * 2 * args.count;
    has_clusters() ? launch<kCluster>(rows, stream) : launch<1>(rows, stream);
  }
  check_launch("likeliest_logits");
}

}  // namespace xgdn::kernel::cuda
