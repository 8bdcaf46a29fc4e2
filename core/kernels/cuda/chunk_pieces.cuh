// SPDX-License-Identifier: Apache-2.0
// What a block of chunk_scan.cuh works on, where sequences are cut into pieces (chunk_split.h), and what pieces leave
// each other.
//
// Cuts are numbered sequence by sequence. A piece of a sequence, but for the last, is the one ahead of a cut: it is
// scanned for states. A piece but for the first is the one behind a cut; for outputs, all first pieces come first, then
// those behind the cuts. Which sequence has a cut is found on the device, from cu_seqlens and ends.
#pragma once

#include <cuda.h>

#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_split.h"
#include "core/kernels/cuda/chunk_tiles.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kGroupRows = 64;  // of S to a warp group

/// Memory of the cuts, per value head. What the piece ahead of a cut does to a state is S <- S map + end; of a
/// sequence's first piece, `end` is the state itself, and in the map's place is the state that the sequence starts
/// from: its slot may have been written when the first piece is scanned for outputs.
struct CutMemory {
  float* ends = nullptr;  // [cuts, HV, V, K]
  char* maps = nullptr;   // [cuts, HV, map_bytes]
  int64_t map_bytes = 0;
};

/// Bytes of a map, in two bf16 parts that add up to it: for every 64 rows a tile of the high parts, then one of the
/// low.
template <int kK>
inline constexpr int kMapTileBytes = kK / 64 * kPanelBytes;

inline int64_t map_bytes(int64_t K, int64_t V) {
  return (K > V ? K : V) * K * static_cast<int64_t>(sizeof(float));
}
inline int64_t end_bytes(int64_t K, int64_t V) {
  return V * K * static_cast<int64_t>(sizeof(float));
}

struct ScanKernel {
  ChunkGatedDeltaRuleArgs args;
  const ChunkFactors* factors;  // [M, HV]
  CutMemory cuts;
  ChunkSplit split;
  int num_stages;
  bool is_q_aligned, is_k_aligned, is_v_aligned, is_out_aligned;
  bool copies_boxes;
  CUtensorMap q_map, k_map, v_map, out_map;  // where it does

  /// Of a cut and a value head.
  __device__ float* end_of(int64_t cut, int64_t head) const {
    return cuts.ends + (cut * args.HV + head) * args.V * args.K;
  }
  __device__ char* map_of(int64_t cut, int64_t head) const {
    return cuts.maps + (cut * args.HV + head) * cuts.map_bytes;
  }
  __device__ float* start_of(int64_t first_cut, int64_t head) const {
    return reinterpret_cast<float*>(map_of(first_cut, head));
  }
};

/// What a block works on.
struct ScanItem {
  int n;
  int piece, num_pieces;
  int64_t first_cut;  // of the sequence, where it has any
  int64_t head, key_head;
  int64_t column;      // of V, the first; of a map its first row
  bool is_map;         // a scan of the rows of a map, without values
  int64_t begin, end;  // tokens
  int64_t chunk;       // the first
  int num_chunks;

  __device__ int64_t token_of(int c) const { return begin + static_cast<int64_t>(c) * kChunk; }
  __device__ int count_of(int c) const {
    const int64_t rest = end - token_of(c);
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }
};

/// A warp group's part of a block's work.
struct GroupPart {
  int group;       // of the block
  int warp;        // of the group
  int64_t column;  // of V, the warp's first of 16; of a map its first row
};

__device__ inline int chunks_of(const ScanKernel& kernel, int64_t n) {
  return (kernel.args.ends[n] - kernel.args.cu_seqlens[n] + kChunk - 1) / kChunk;
}

__device__ inline int cuts_of(const ScanKernel& kernel, int64_t n) {
  return n < kernel.args.N ? kernel.split.pieces(chunks_of(kernel, n)) - 1 : 0;
}

/// Cuts of the sequences before n. A warp together.
__device__ inline int64_t cuts_before(const ScanKernel& kernel, int n) {
  int sum = 0;
  for (int i = threadIdx.x % 32; i < n; i += 32) sum += cuts_of(kernel, i);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

/// The sequence that has the cut, and the first of its cuts; N where no sequence has it. A warp together.
__device__ inline int sequence_of(const ScanKernel& kernel, int64_t cut, int64_t& first_cut) {
  const int lane = threadIdx.x % 32;
  first_cut = 0;
  for (int64_t first = 0; first < kernel.args.N; first += 32) {
    const int cuts = cuts_of(kernel, first + lane);
    int sum = cuts;  // of the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += before;
    }
    const unsigned reached = __ballot_sync(kFullWarp, first_cut + sum > cut);
    if (reached != 0) {
      const int found = __ffs(static_cast<int>(reached)) - 1;
      first_cut += __shfl_sync(kFullWarp, sum - cuts, found);
      return static_cast<int>(first) + found;
    }
    first_cut += __shfl_sync(kFullWarp, sum, 31);
  }
  return static_cast<int>(kernel.args.N);
}

/// What block `index` of a scan works on, in blocks of `rows` rows; false: on nothing.
template <bool kHasOutputs>
__device__ inline bool find_item(const ScanKernel& kernel, int64_t index, int64_t rows, ScanItem& item) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const int64_t v_blocks = a.V / rows;
  const int64_t blocks = v_blocks + (!kHasOutputs && kernel.split.jumps() ? a.K / rows : 0);
  const int64_t block = index % blocks;
  item.is_map = block >= v_blocks;
  item.column = (item.is_map ? block - v_blocks : block) * rows;
  item.head = index / blocks % a.HV;
  item.key_head = item.head / (a.HV / a.H);
  const int64_t place = index / (blocks * a.HV);
  if (kHasOutputs && place < a.N) {
    item.n = static_cast<int>(place);
    item.piece = 0;
    item.first_cut = cuts_of(kernel, item.n) > 0 ? cuts_before(kernel, item.n) : 0;
  } else {
    const int64_t cut = kHasOutputs ? place - a.N : place;
    item.n = sequence_of(kernel, cut, item.first_cut);
    if (item.n >= a.N) return false;
    item.piece = static_cast<int>(cut - item.first_cut) + (kHasOutputs ? 1 : 0);
  }
  const int chunks = chunks_of(kernel, item.n);
  item.num_pieces = kernel.split.pieces(chunks);
  const int first = kernel.split.first_chunk(chunks, item.num_pieces, item.piece);
  const int last = kernel.split.first_chunk(chunks, item.num_pieces, item.piece + 1);
  item.begin = a.cu_seqlens[item.n] + static_cast<int64_t>(first) * kChunk;
  item.end =
      item.piece + 1 < item.num_pieces ? a.cu_seqlens[item.n] + static_cast<int64_t>(last) * kChunk : a.ends[item.n];
  item.chunk = a.chunk_offsets[item.n] + first;
  item.num_chunks = last - first;
  return !(item.is_map && item.piece == 0);  // its end is no sum of two
}

}  // namespace xgdn::kernel::cuda
