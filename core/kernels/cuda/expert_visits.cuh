// SPDX-License-Identifier: Apache-2.0
// Which experts the tokens have chosen, expert after expert, arranged on the device. A visit is a token at one of its
// experts: visit t * A + a is choice a of token t. The host knows how many there are, but not at which experts.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/dependent_launch.cuh"

namespace xgdn::kernel::cuda {

/// Neighbouring visits to one expert that a block works on together.
struct VisitTile {
  int expert;
  int begin;  // place of the first one among the sorted visits
  int count;
};

struct ExpertVisits {
  int* sorted = nullptr;       // [V]  the visits, expert after expert
  VisitTile* tiles = nullptr;  // [max_tiles]
  int* num_tiles = nullptr;    // [1]
  int max_tiles = 0;
};

/// Tiles that V visits to E experts make at most.
inline int64_t max_visit_tiles(int64_t V, int64_t E, int64_t tile) {
  return V / tile + (V < E ? V : E);
}

inline constexpr int kSortThreads = 1024;
inline constexpr int kMaxExperts = 4096;

/// One block, with memory for 8 E bytes. The order of an expert's visits is left open: no result depends on it.
static __global__ void __launch_bounds__(kSortThreads)
    sort_by_expert(const int64_t* chosen, int V, int E, int tile, ExpertVisits visits) {
  constexpr int kWarp = 32;
  constexpr unsigned kAll = ~0u;
  extern __shared__ int counts[];  // [E]
  int* places = counts + E;        // [E]  of the next visit
  __shared__ int2 before_warp[kSortThreads / kWarp];
  const int thread = threadIdx.x;
  begin_overlapped();
  for (int e = thread; e < E; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  for (int v = thread; v < V; v += kSortThreads) atomicAdd(&counts[chosen[v]], 1);
  __syncthreads();

  // Sums of visits and of tiles before each expert. A thread has neighbouring experts.
  const int per_thread = (E + kSortThreads - 1) / kSortThreads;
  const int first = min(thread * per_thread, E);
  const int last = min(first + per_thread, E);
  int2 own = {};
  for (int e = first; e < last; ++e) own = {own.x + counts[e], own.y + (counts[e] + tile - 1) / tile};
  int2 sum = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int x = __shfl_up_sync(kAll, sum.x, distance);
    const int y = __shfl_up_sync(kAll, sum.y, distance);
    if (thread % kWarp >= distance) sum = {sum.x + x, sum.y + y};
  }
  if (thread % kWarp == kWarp - 1) before_warp[thread / kWarp] = sum;
  __syncthreads();
  if (thread < kWarp) {
    const int2 of_warp = before_warp[thread];
    int2 all = of_warp;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int x = __shfl_up_sync(kAll, all.x, distance);
      const int y = __shfl_up_sync(kAll, all.y, distance);
      if (thread >= distance) all = {all.x + x, all.y + y};
    }
    before_warp[thread] = {all.x - of_warp.x, all.y - of_warp.y};
    if (thread == kWarp - 1) *visits.num_tiles = all.y;
  }
  __syncthreads();
  const int2 before = before_warp[thread / kWarp];
  int place = before.x + sum.x - own.x;
  int next_tile = before.y + sum.y - own.y;
  for (int e = first; e < last; ++e) {
    places[e] = place;
    for (int begin = 0; begin < counts[e]; begin += tile) {
      visits.tiles[next_tile++] = {.expert = e, .begin = place + begin, .count = min(tile, counts[e] - begin)};
    }
    place += counts[e];
  }
  __syncthreads();
  for (int v = thread; v < V; v += kSortThreads) visits.sorted[atomicAdd(&places[chosen[v]], 1)] = v;
}

}  // namespace xgdn::kernel::cuda
