// SPDX-License-Identifier: Apache-2.0
// The pass over a sequence's chunks: chunk_gated_delta_rule's states and outputs, from the factors of its chunks.
//
// A warp group takes 64 rows of S of one value head, a warp 16 of them, and needs nothing of the other rows: all
// products are of these rows, with V and O transposed so that their columns are tokens. With X the inverse times beta
// and P the scores of a chunk:
//
//   R^T = V^T - (S K^T) read          what the old state gets wrong
//   U^T = R^T X^T                     what is written
//   O^T = (S Q^T) out + U^T P^T
//   S  <- last S + (U^T write) K
//
// S stays in registers in f32. The sums of each product, rounded to bf16, are the left operand of the next; right
// operands come from shared memory, which a warp group of its own fills some chunks ahead. What S waits for comes
// first; the outputs of a chunk leave while the next one's first product runs. The order of sums depends on nothing but
// the chunk, so a sequence's bits do not depend on other sequences, nor on how many groups of rows a block takes.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kGroupRows = 64;  // of S to a warp group
inline constexpr int kGroupThreads = 128;
inline constexpr int kMaxStages = 4;

/// A chunk: of its key head, its value head, and its value head's factors.
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

struct ScanKernel {
  ChunkGatedDeltaRuleArgs args;
  const ChunkFactors* factors;  // [M, HV]
  int num_stages;
  bool is_q_aligned, is_k_aligned, is_v_aligned, is_out_aligned;
  CUtensorMap q_map, k_map, v_map, out_map;  // where the kernel copies boxes
};

/// What a block works on.
struct ScanItem {
  int64_t head, key_head;
  int64_t column;      // of V, the first
  int64_t begin, end;  // tokens
  int64_t chunk;       // the first
  int num_chunks;

  __device__ int64_t token_of(int c) const { return begin + static_cast<int64_t>(c) * kChunk; }
  __device__ int count_of(int c) const {
    const int64_t rest = end - token_of(c);
    return rest < kChunk ? static_cast<int>(rest) : kChunk;
  }
};

/// Stage and parity of the chunk that a warp is at.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// ---- filling the stages by boxes: one warp
// ---------------------------------------------------------------------------

template <int kK, int kGroups>
__device__ inline void fill_stages_by_boxes(const ScanKernel& kernel, const ScanItem& item,
                                            ScanStage<kK, kGroups>* stages, ScanBarriers& barriers) {
  constexpr int kPanels = kK / 64;
  constexpr uint32_t kBytes = (2 * kPanels + kGroups) * kPanelBytes + sizeof(ChunkFactors);
  const int head = static_cast<int>(item.head), key_head = static_cast<int>(item.key_head);
  StageCursor at;
  for (int c = 0; c < item.num_chunks; ++c) {
    const int token = static_cast<int>(item.token_of(c));
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    const uint32_t full = shared_address(&barriers.full[at.stage]);
    wait_at(shared_address(&barriers.empty[at.stage]), at.parity ^ 1);
    arrive_and_expect(full, kBytes);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      copy_box(shared_address(stage.k + i * kPanelBytes), kernel.k_map, i * 64, key_head, token, full);
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = static_cast<int>(item.column) + i * kGroupRows;
      copy_box(shared_address(stage.v[i]), kernel.v_map, column, head, token, full);
    }
    const ChunkFactors& factors = kernel.factors[(item.chunk + c) * kernel.args.HV + item.head];
    copy_bulk(shared_address(&stage.factors), &factors, sizeof(ChunkFactors), full);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      copy_box(shared_address(stage.q + i * kPanelBytes), kernel.q_map, i * 64, key_head, token, full);
    }
    at.advance(kernel.num_stages);
  }
}

// ---- filling the stages by pieces: a warp group
// ----------------------------------------------------------------------

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

__device__ inline void copy_factors(const ChunkFactors& from, ChunkFactors& to) {
  constexpr int kPieces = sizeof(ChunkFactors) / kPieceBytes;
  for (int i = threadIdx.x % kGroupThreads; i < kPieces; i += kGroupThreads) {
    copy_async(shared_address(&to) + i * kPieceBytes, reinterpret_cast<const char*>(&from) + i * kPieceBytes, false);
  }
}

template <int kK, int kGroups>
__device__ inline void fill_stages_by_pieces(const ScanKernel& kernel, const ScanItem& item,
                                             ScanStage<kK, kGroups>* stages, ScanBarriers& barriers) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const bool lags = kernel.num_stages > 2;  // a stage is announced when the copies of the next are under way
  StageCursor at, announced;
  const auto announce = [&] {
    fence_shared_memory();
    arrive_at(shared_address(&barriers.full[announced.stage]));
    announced.advance(kernel.num_stages);
  };
  for (int c = 0; c < item.num_chunks; ++c) {
    const int64_t token = item.token_of(c);
    const int count = item.count_of(c);
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    wait_at(shared_address(&barriers.empty[at.stage]), at.parity ^ 1);
    copy_tile<kK>(a.k, kernel.is_k_aligned, token, count, item.key_head, 0, stage.k);
    copy_tile<kK>(a.q, kernel.is_q_aligned, token, count, item.key_head, 0, stage.q);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      copy_tile<kGroupRows>(a.v, kernel.is_v_aligned, token, count, item.head, item.column + group * kGroupRows,
                            stage.v[group]);
    }
    copy_factors(kernel.factors[(item.chunk + c) * a.HV + item.head], stage.factors);
    commit_copies();
    at.advance(kernel.num_stages);
    if (!lags) {
      wait_copies<0>();
      announce();
    } else if (c > 0) {
      wait_copies<1>();
      announce();
    }
  }
  if (lags && item.num_chunks > 0) {
    wait_copies<0>();
    announce();
  }
}

// ---- a warp group's rows
// ---------------------------------------------------------------------------------------------

/// A warp group's part of a block's work.
struct GroupPart {
  int group;       // of the block
  int warp;        // of the group
  int64_t column;  // of V, the warp's first of 16
};

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

/// 16 rows of a state, in the fragments of sums.
template <class State, int kTiles>
__device__ inline void load_state(const State* rows, float (&S)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const State* from = rows + (lane / 4 + 8 * half) * kTiles * 8 + tile * 8 + lane % 4 * 2;
      float2 pair;
      if constexpr (sizeof(State) == 4) {
        pair = *reinterpret_cast<const float2*>(from);
      } else {
        pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
      }
      S[tile][2 * half] = pair.x, S[tile][2 * half + 1] = pair.y;
    }
  }
}

template <class State, int kTiles>
__device__ inline void store_state(const float (&S)[kTiles][4], State* rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      State* to = rows + (lane / 4 + 8 * half) * kTiles * 8 + tile * 8 + lane % 4 * 2;
      if constexpr (sizeof(State) == 4) {
        *reinterpret_cast<float2*>(to) = make_float2(S[tile][2 * half], S[tile][2 * half + 1]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(S[tile][2 * half], S[tile][2 * half + 1]);
      }
    }
  }
}

/// A thread's factors of the tokens of its fragments.
__device__ inline void load_factors(const float* from, float2 (&factors)[8]) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    factors[tile] = *reinterpret_cast<const float2*>(from + tile * 8 + threadIdx.x % 4 * 2);
  }
}

/// V^T as a left operand becomes R^T = V^T - (S K^T) read; 0 behind `count` tokens.
__device__ inline void subtract_read(const float (&sk)[8][4], const float2 (&read)[8], int count, uint32_t (&r)[4][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int tile = 2 * i + j / 2;
      const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&r[i][j]));
      r[i][j] = pack_bf16(fmaf(-read[tile].x, sk[tile][j % 2 * 2], value.x),
                          fmaf(-read[tile].y, sk[tile][j % 2 * 2 + 1], value.y));
    }
  }
  if (count < kChunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = i * 16 + j / 2 * 8 + 2 * t;
        if (token >= count) {
          r[i][j] = 0;
        } else if (token + 1 >= count) {
          r[i][j] &= 0xffffu;
        }
      }
    }
  }
}

/// Zeros behind the keys of a sequence's last chunk: boxes hold the next sequence's there, whatever they are.
template <int kK>
__device__ inline void clear_keys(char* k, int count, int group) {
  for (int i = threadIdx.x % kGroupThreads; i < (kChunk - count) * (kK / 8); i += kGroupThreads) {
    *reinterpret_cast<uint4*>(k + piece_offset(count + i / (kK / 8), i % (kK / 8))) = make_uint4(0, 0, 0, 0);
  }
  fence_shared_memory();
  sync_group(group);
}

template <int kK, int kGroups, bool kByBoxes>
__device__ inline void scan_chunks(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                   ScanStage<kK, kGroups>* stages, ScanTail<kGroups>& tail, float (&S)[kK / 8][4]) {
  char* panel = tail.out[part.group];
  StageCursor at;
  PackedOutputs packed = {};
  uint32_t state[kK / 16][4];
  round_sums(S, state);
  for (int c = 0; c < item.num_chunks; ++c) {
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    const int count = item.count_of(c);
    wait_at(shared_address(&tail.barriers.full[at.stage]), at.parity);
    if (kByBoxes && count < kChunk) clear_keys<kK>(stage.k, count, part.group);

    const ChunkGates& gates = stage.factors.gates;
    float u[8][4], o[8][4];
    float2 factors[8];
    fence_products();
    multiply_by_rows(u, state, shared_address(stage.k));
    commit_products();
    uint32_t left[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrices_transposed(columns_address(stage.v[part.group], part.warp, i), left[i]);
    }
    load_factors(gates.read, factors);
    wait_products<0>();
    pin(u);

    subtract_read(u, factors, count, left);
    fence_products();
    multiply_by_square(u, left, shared_address(&stage.factors.inverse));
    commit_products();
    load_factors(gates.write, factors);
#pragma unroll
    for (int tile = 0; tile < kK / 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[tile][i] *= gates.last;
    }
    wait_products<0>();
    pin(u);

    uint32_t writes[4][4];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      const float(&x)[4] = u[opposite_tile(tile)];
      writes[tile / 2][tile % 2 * 2] = pack_bf16(x[0] * factors[tile].x, x[1] * factors[tile].y);
      writes[tile / 2][tile % 2 * 2 + 1] = pack_bf16(x[2] * factors[tile].x, x[3] * factors[tile].y);
      left[tile / 2][tile % 2 * 2] = pack_bf16(x[0], x[1]);
      left[tile / 2][tile % 2 * 2 + 1] = pack_bf16(x[2], x[3]);
    }
    pin(S);
    pin(u);
    fence_products();
    multiply_by_columns(S, writes, shared_address(stage.k));
    commit_products();
    multiply_by_rows(o, state, shared_address(stage.q));
    commit_products();
    multiply_by_square(u, left, shared_address(&stage.factors.scores));
    commit_products();
    if constexpr (kByBoxes) store_box_of_outputs(kernel, item, part, c - 1, packed, panel);
    load_factors(gates.out, factors);
    wait_products<1>();
    pin(S);
    pin(o);
    round_sums(S, state);
    wait_products<0>();
    pin(u);
    add_outputs(o, factors, u);
    arrive_at(shared_address(&tail.barriers.empty[at.stage]));
    at.advance(kernel.num_stages);
    if constexpr (kByBoxes) {
      pack_outputs(DType::kBFloat16, o, packed);
    } else if (kernel.args.out.dtype == DType::kFloat32 || !kernel.is_out_aligned) {
      store_each_output(kernel, item, part, c, o);
    } else {
      pack_outputs(kernel.args.out.dtype, o, packed);
      store_outputs(kernel, item, part, c, packed, panel);
    }
  }
  if (kByBoxes && item.num_chunks > 0) {
    wait_stores_read();
    store_outputs(kernel, item, part, item.num_chunks - 1, packed, panel);
  }
}

/// From the state that a sequence reads to the one that it writes.
template <int kK, int kGroups, bool kByBoxes>
__device__ inline void scan_sequence(const ScanKernel& kernel, const ScanItem& item, int n, const GroupPart& part,
                                     ScanStage<kK, kGroups>* stages, ScanTail<kGroups>& tail) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const int64_t first_row = (item.head * a.V + part.column) * kK;
  const auto read_slot = a.state.read[n] * a.state.stride + first_row;
  float S[kK / 8][4] = {};
  if (a.has_initial_state == nullptr || a.has_initial_state[n]) {
    if (a.state.dtype == DType::kFloat32) {
      load_state(static_cast<const float*>(a.state.data) + read_slot, S);
    } else {
      load_state(static_cast<const __nv_bfloat16*>(a.state.data) + read_slot, S);
    }
  }
  scan_chunks<kK, kGroups, kByBoxes>(kernel, item, part, stages, tail, S);
  if (a.state.write[n] < 0) return;
  const auto write_slot = a.state.write[n] * a.state.stride + first_row;
  if (a.state.dtype == DType::kFloat32) {
    store_state(S, static_cast<float*>(a.state.data) + write_slot);
  } else {
    store_state(S, static_cast<__nv_bfloat16*>(a.state.data) + write_slot);
  }
}

template <int kK, int kGroups, bool kByBoxes>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, 1)
    chunk_scan_kernel(const __grid_constant__ ScanKernel kernel) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  auto* stages = reinterpret_cast<ScanStage<kK, kGroups>*>(shared_memory);
  auto& tail = *reinterpret_cast<ScanTail<kGroups>*>(stages + kernel.num_stages);

  const int warp = threadIdx.x / 32;
  const int64_t v_blocks = a.V / (kGroupRows * kGroups);
  const int n = static_cast<int>(blockIdx.x / (v_blocks * a.HV));
  ScanItem item;
  item.head = blockIdx.x / v_blocks % a.HV;
  item.key_head = item.head / (a.HV / a.H);
  item.column = blockIdx.x % v_blocks * kGroupRows * kGroups;
  item.begin = a.cu_seqlens[n];
  item.end = a.cu_seqlens[n + 1];
  item.chunk = a.chunk_offsets[n];
  item.num_chunks = static_cast<int>((item.end - item.begin + kChunk - 1) / kChunk);
  const GroupPart part = {warp / 4, warp % 4, item.column + warp * 16};
  if (a.state.read[n] < 0) {
    if (warp < kGroups * 4) clear_outputs(a.out, item, part.column);
    return;
  }
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kernel.num_stages; ++stage) {
      init_barrier(shared_address(&tail.barriers.full[stage]), kByBoxes ? 1 : kGroupThreads);
      init_barrier(shared_address(&tail.barriers.empty[stage]), kGroups * kGroupThreads);
    }
  }
  fence_shared_memory();
  __syncthreads();
  if (warp >= kGroups * 4) {
    if constexpr (kGroups == 2) leave_registers<40>();
    wait_for_kernel_before();  // for the factors; nobody else reads what it wrote
    if constexpr (!kByBoxes) {
      fill_stages_by_pieces<kK, kGroups>(kernel, item, stages, tail.barriers);
    } else if (threadIdx.x == kGroups * kGroupThreads) {
      fill_stages_by_boxes<kK, kGroups>(kernel, item, stages, tail.barriers);
    }
  } else {
    if constexpr (kGroups == 2) take_registers<232>();
    scan_sequence<kK, kGroups, kByBoxes>(kernel, item, n, part, stages, tail);
  }
}

}  // namespace xgdn::kernel::cuda
