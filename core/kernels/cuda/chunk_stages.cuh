// SPDX-License-Identifier: Apache-2.0
// The stages of chunk_scan.cuh's shared memory, and what fills them some chunks ahead of the products: a warp that
// starts bulk copies of boxes (Hopper), or a warp group that copies pieces of 16 bytes, for any strides and types.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/chunk_pieces.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kGroupThreads = 128;
inline constexpr int kMaxStages = 4;

/// A chunk: of its key head, its value head, and its value head's factors. Ahead of the chunks of a piece, 64 rows of a
/// map: the high parts in k, the low ones in q.
template <int kK, int kGroups>
struct alignas(1024) ScanStage {
  char k[kK / 64 * kPanelBytes];
  char q[kK / 64 * kPanelBytes];
  char v[kGroups][kPanelBytes];
  ChunkFactors factors;
};

struct ScanBarriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};

/// Stages lie before it.
template <int kGroups>
struct ScanTail {
  char out[kGroups][kPanelBytes];
  ScanBarriers barriers;
};

template <int kK, int kGroups>
constexpr size_t scan_memory(int num_stages) {
  return num_stages * sizeof(ScanStage<kK, kGroups>) + sizeof(ScanTail<kGroups>);
}

/// Stage and parity of the chunk that a warp is at.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

/// 64 rows at a time, of the maps that lead to a piece's first state.
template <int kK>
__device__ inline int map_parts(const ScanItem& item) {
  return item.piece > 1 ? (item.piece - 1) * (kK / 64) : 0;
}

template <int kK>
__device__ inline const char* map_part(const ScanKernel& kernel, const ScanItem& item, int i) {
  return kernel.map_of(item.first_cut + 1 + i / (kK / 64), item.head) + i % (kK / 64) * 2 * kMapTileBytes<kK>;
}

// ---- by boxes: one warp ---------------------------------------------------------------------------------------------

template <int kK, int kGroups, bool kHasOutputs>
__device__ inline void fill_stages_by_boxes(const ScanKernel& kernel, const ScanItem& item,
                                            ScanStage<kK, kGroups>* stages, ScanBarriers& barriers) {
  constexpr int kPanels = kK / 64;
  constexpr uint32_t kFactorBytes =
      kHasOutputs ? sizeof(ChunkFactors) : sizeof(ChunkFactors::inverse) + sizeof(ChunkFactors::gates);
  const uint32_t chunk_bytes =
      ((kHasOutputs ? 2 : 1) * kPanels + (item.is_map ? 0 : kGroups)) * kPanelBytes + kFactorBytes;
  const int head = static_cast<int>(item.head), key_head = static_cast<int>(item.key_head);
  StageCursor at;
  const auto begin_stage = [&](uint32_t bytes) {
    const uint32_t full = shared_address(&barriers.full[at.stage]);
    wait_at(shared_address(&barriers.empty[at.stage]), at.parity ^ 1);
    arrive_and_expect(full, bytes);
    return full;
  };
  if constexpr (kHasOutputs) {
    for (int i = 0; i < map_parts<kK>(item); ++i) {
      ScanStage<kK, kGroups>& stage = stages[at.stage];
      const uint32_t full = begin_stage(2 * kMapTileBytes<kK>);
      const char* const from = map_part<kK>(kernel, item, i);
      copy_bulk(shared_address(stage.k), from, kMapTileBytes<kK>, full);
      copy_bulk(shared_address(stage.q), from + kMapTileBytes<kK>, kMapTileBytes<kK>, full);
      at.advance(kernel.num_stages);
    }
  }
  for (int c = 0; c < item.num_chunks; ++c) {
    const int token = static_cast<int>(item.token_of(c));
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    const uint32_t full = begin_stage(chunk_bytes);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      copy_box(shared_address(stage.k + i * kPanelBytes), kernel.k_map, i * 64, key_head, token, full);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = static_cast<int>(item.column) + i * kGroupRows;
      if (!item.is_map) copy_box(shared_address(stage.v[i]), kernel.v_map, column, head, token, full);
    }
    const ChunkFactors& factors = kernel.factors[(item.chunk + c) * kernel.args.HV + item.head];
    if constexpr (kHasOutputs) {
      copy_bulk(shared_address(&stage.factors), &factors, sizeof(ChunkFactors), full);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        copy_box(shared_address(stage.q + i * kPanelBytes), kernel.q_map, i * 64, key_head, token, full);
      }
    } else {
      copy_bulk(shared_address(&stage.factors.inverse), &factors.inverse, sizeof(factors.inverse), full);
      copy_bulk(shared_address(&stage.factors.gates), &factors.gates, sizeof(factors.gates), full);
    }
    at.advance(kernel.num_stages);
  }
}

// ---- by pieces of 16 bytes: a warp group ----------------------------------------------------------------------------

/// kColumns elements from `column` on of a chunk's rows, zeros behind them.
template <int kColumns>
__device__ inline void copy_tile(const InRows& rows, bool is_aligned, int64_t token, int count, int64_t head,
                                 int64_t column, char* tile) {
  constexpr int kPieces = kColumns / 8;  // of a row
  constexpr int kStep = kGroupThreads / kPieces;
  static_assert(kStep % 8 == 0);  // so that a thread's pieces lie at the same place of their rows
  const int thread = threadIdx.x % kGroupThreads;
  const int piece = thread % kPieces;
  if (rows.dtype == DType::kBFloat16 && is_aligned) {
    const char* from = row_of(rows, token + thread / kPieces, head) + (column + piece * 8) * 2;
    const int64_t step = rows.token_stride * 2 * kStep;
    uint32_t to = shared_address(tile) + piece_offset(thread / kPieces, piece);
#pragma unroll 4
    for (int row = thread / kPieces; row < kChunk; row += kStep, from += step, to += kStep * 128) {
      const bool is_zero = row >= count;
      copy_async(to, is_zero ? rows.data : from, is_zero);
    }
  } else {
#pragma unroll 1
    for (int row = thread / kPieces; row < kChunk; row += kStep) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < count) x = load_piece(rows.dtype, is_aligned, row_of(rows, token + row, head), column + piece * 8);
      *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = x;
    }
  }
}

__device__ inline void copy_bytes(const void* from, void* to, int bytes) {
  for (int i = threadIdx.x % kGroupThreads * kPieceBytes; i < bytes; i += kGroupThreads * kPieceBytes) {
    copy_async(shared_address(to) + i, static_cast<const char*>(from) + i);
  }
}

template <int kK, int kGroups, bool kHasOutputs>
__device__ inline void copy_chunk(const ScanKernel& kernel, const ScanItem& item, int c,
                                  ScanStage<kK, kGroups>& stage) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const int64_t token = item.token_of(c);
  const int count = item.count_of(c);
  const ChunkFactors& factors = kernel.factors[(item.chunk + c) * a.HV + item.head];
  copy_tile<kK>(a.k, kernel.is_k_aligned, token, count, item.key_head, 0, stage.k);
  if constexpr (kHasOutputs) copy_tile<kK>(a.q, kernel.is_q_aligned, token, count, item.key_head, 0, stage.q);
#pragma unroll 1
  for (int group = 0; group < (item.is_map ? 0 : kGroups); ++group) {
    copy_tile<kGroupRows>(a.v, kernel.is_v_aligned, token, count, item.head, item.column + group * kGroupRows,
                          stage.v[group]);
  }
  copy_bytes(&factors, &stage.factors, sizeof(ChunkFactors));
}

template <int kK, int kGroups, bool kHasOutputs>
__device__ inline void fill_stages_by_pieces(const ScanKernel& kernel, const ScanItem& item,
                                             ScanStage<kK, kGroups>* stages, ScanBarriers& barriers) {
  const bool lags = kernel.num_stages > 2;  // a stage is announced when the copies of the next are under way
  const int parts = kHasOutputs ? map_parts<kK>(item) : 0;
  const int num_stages = parts + item.num_chunks;
  StageCursor at, announced;
  const auto announce = [&] {
    fence_shared_memory();
    arrive_at(shared_address(&barriers.full[announced.stage]));
    announced.advance(kernel.num_stages);
  };
  for (int i = 0; i < num_stages; ++i) {
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    wait_at(shared_address(&barriers.empty[at.stage]), at.parity ^ 1);
    if (i < parts) {
      const char* const from = map_part<kK>(kernel, item, i);
      copy_bytes(from, stage.k, kMapTileBytes<kK>);
      copy_bytes(from + kMapTileBytes<kK>, stage.q, kMapTileBytes<kK>);
    } else {
      copy_chunk<kK, kGroups, kHasOutputs>(kernel, item, i - parts, stage);
    }
    commit_copies();
    at.advance(kernel.num_stages);
    if (!lags) {
      wait_copies<0>();
      announce();
    } else if (i > 0) {
      wait_copies<1>();
      announce();
    }
  }
  if (lags && num_stages > 0) {
    wait_copies<0>();
    announce();
  }
}

}  // namespace xgdn::kernel::cuda
