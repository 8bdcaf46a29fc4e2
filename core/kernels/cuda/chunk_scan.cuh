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
// operands come from shared memory, which a warp group of its own fills some chunks ahead. V and O go through 16
// columns of a warp's own. The order of sums depends on nothing but the chunk, so a sequence's bits do not depend on
// other sequences, nor on how many groups of rows a block takes.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kGroupRows = 64;  // of S to a warp group
inline constexpr int kGroupThreads = 128;
inline constexpr int kMaxStages = 4;

/// A chunk of the keys' head and of the value head's factors.
template <int kK>
struct alignas(1024) ScanStage {
  char k[kK / 64 * kPanelBytes];
  char q[kK / 64 * kPanelBytes];
  char inverse[kPanelBytes];
  char scores[kPanelBytes];
  ChunkGates gates;
};

/// 16 columns of v or o: rows of two pieces, swapped in every other four rows.
struct WarpColumns {
  char rows[kChunk][2 * kPieceBytes];

  static __device__ int offset(int row, int piece) {
    return row * 2 * kPieceBytes + (piece ^ row / 4 % 2) * kPieceBytes;
  }
};

struct ScanBarriers {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
};

template <int kK, int kGroups>
constexpr size_t scan_memory(int num_stages) {
  return num_stages * sizeof(ScanStage<kK>) + kGroups * 4 * 2 * sizeof(WarpColumns) + sizeof(ScanBarriers);
}

struct ScanKernel {
  ChunkGatedDeltaRuleArgs args;
  ChunkFactors factors;
  int num_stages;
  bool is_q_aligned, is_k_aligned, is_v_aligned, is_out_aligned;
};

/// What a block works on.
struct ScanItem {
  int64_t head, key_head;
  int64_t begin, end;  // tokens
  int64_t chunk;       // the first
  int num_chunks;
};

/// Stage and parity of the chunk that a warp is at.
struct StageCursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

// ---- the group that fills the stages
// ---------------------------------------------------------------------------------

template <int kK>
__device__ inline void copy_tile(const InRows& rows, bool is_aligned, int64_t token, int count, int64_t head,
                                 char* tile) {
  constexpr int kPieces = kK / 8;  // of a row
  const int thread = threadIdx.x % kGroupThreads;
  const int piece = thread % kPieces;
  if (rows.dtype == DType::kBFloat16 && is_aligned) {
    const char* from = row_of(rows, token, head) + piece * kPieceBytes;
    const uint32_t to = shared_address(tile);
    const int64_t row_bytes = rows.token_stride * 2;
#pragma unroll 8
    for (int row = thread / kPieces; row < kChunk; row += kGroupThreads / kPieces) {
      const bool is_zero = row >= count;
      copy_async(to + piece_offset(row, piece), is_zero ? from : from + row * row_bytes, is_zero);
    }
  } else {
    for (int row = thread / kPieces; row < kChunk; row += kGroupThreads / kPieces) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (row < count) x = load_piece(rows.dtype, is_aligned, row_of(rows, token + row, head), piece * 8);
      *reinterpret_cast<uint4*>(tile + piece_offset(row, piece)) = x;
    }
  }
}

__device__ inline void copy_square(const ChunkSquare& square, char* tile) {
  const int thread = threadIdx.x % kGroupThreads;
  const uint32_t to = shared_address(tile);
  const uint4* from = &square.pieces[0][0][0];
#pragma unroll
  for (int index = thread; index < kChunk * kChunk / 8; index += kGroupThreads) {
    const int row = index / kChunk * 8 + index % 8;
    const int piece = index / 8 % 8;
    if (ChunkSquare::has(row, piece)) copy_async(to + piece_offset(row, piece), from + index, false);
  }
}

__device__ inline void copy_gates(const ChunkGates& from, ChunkGates& to) {
  constexpr int kPieces = sizeof(ChunkGates) / kPieceBytes;
  static_assert(kPieces <= kGroupThreads);
  const int i = threadIdx.x % kGroupThreads;
  if (i < kPieces) {
    copy_async(shared_address(&to) + i * kPieceBytes, reinterpret_cast<const char*>(&from) + i * kPieceBytes, false);
  }
}

template <int kK>
__device__ inline void fill_stages(const ScanKernel& kernel, const ScanItem& item, ScanStage<kK>* stages,
                                   ScanBarriers& barriers) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const bool lags = kernel.num_stages > 2;  // a stage is announced when the copies of the next are under way
  StageCursor at, announced;
  const auto announce = [&] {
    fence_for_tensor_cores();
    arrive_at(shared_address(&barriers.full[announced.stage]));
    announced.advance(kernel.num_stages);
  };
  for (int c = 0; c < item.num_chunks; ++c) {
    const int64_t token = item.begin + static_cast<int64_t>(c) * kChunk;
    const int64_t rest = item.end - token;
    const int count = rest < kChunk ? static_cast<int>(rest) : kChunk;
    const int64_t index = (item.chunk + c) * a.HV + item.head;
    ScanStage<kK>& stage = stages[at.stage];
    wait_at(shared_address(&barriers.empty[at.stage]), at.parity ^ 1);
    copy_tile<kK>(a.k, kernel.is_k_aligned, token, count, item.key_head, stage.k);
    copy_gates(kernel.factors.gates[index], stage.gates);
    copy_square(kernel.factors.inverse[index], stage.inverse);
    copy_tile<kK>(a.q, kernel.is_q_aligned, token, count, item.key_head, stage.q);
    copy_square(kernel.factors.scores[index], stage.scores);
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

// ---- columns of v and o
// ----------------------------------------------------------------------------------------------

/// 16 columns of v from `column` on of a chunk's tokens, zeros behind them; ends when this thread's copies do.
__device__ inline void start_values(const ScanKernel& kernel, const ScanItem& item, int c, int64_t column,
                                    WarpColumns& to) {
  const InRows& rows = kernel.args.v;
  const int lane = threadIdx.x % 32;
  const int piece = lane % 2;
  const int64_t token = item.begin + static_cast<int64_t>(c) * kChunk;
  const bool is_copied = rows.dtype == DType::kBFloat16 && kernel.is_v_aligned;
  for (int row = lane / 2; row < kChunk; row += 16) {
    char* place = &to.rows[0][0] + WarpColumns::offset(row, piece);
    const bool is_zero = token + row >= item.end;
    if (is_copied) {
      const char* from = row_of(rows, is_zero ? token : token + row, item.head) + (column + piece * 8) * 2;
      copy_async(shared_address(place), from, is_zero);
    } else {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (!is_zero) {
        x = load_piece(rows.dtype, kernel.is_v_aligned, row_of(rows, token + row, item.head), column + piece * 8);
      }
      *reinterpret_cast<uint4*>(place) = x;
    }
  }
}

/// What row of matrix lane / 8 a lane names of the 8 x 8 matrices of tiles 2 i and 2 i + 1: two of columns, twice.
__device__ inline uint32_t columns_address(const WarpColumns& columns, int i) {
  const int lane = threadIdx.x % 32;
  return shared_address(&columns) + WarpColumns::offset(i * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

__device__ inline uint32_t pack_out(DType dtype, float first, float second) {
  if (dtype == DType::kFloat16) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  return pack_bf16(first, second);
}

__device__ inline void store_outputs(const ScanKernel& kernel, const ScanItem& item, int c, int64_t column,
                                     const float (&o)[8][4], WarpColumns& columns) {
  const OutRows& rows = kernel.args.out;
  const int lane = threadIdx.x % 32;
  const int64_t token = item.begin + static_cast<int64_t>(c) * kChunk;
  if (rows.dtype == DType::kFloat32 || !kernel.is_out_aligned) {
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = token + tile * 8 + lane % 4 * 2 + i % 2;
        if (row < item.end) {
          store_scalar(rows.dtype, row_of(rows, row, item.head), column + lane / 4 + i / 2 * 8, o[tile][i]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = transpose_matrix(pack_out(rows.dtype, o[tile][2 * half], o[tile][2 * half + 1]));
      char* place = &columns.rows[0][0] + WarpColumns::offset(tile * 8 + lane / 4, half);
      reinterpret_cast<uint32_t*>(place)[lane % 4] = pair;
    }
  }
  __syncwarp();
  for (int row = lane / 2; row < kChunk; row += 16) {
    if (token + row >= item.end) break;
    const char* place = &columns.rows[0][0] + WarpColumns::offset(row, lane % 2);
    char* to = row_of(rows, token + row, item.head) + (column + lane % 2 * 8) * 2;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(place);
  }
}

__device__ inline void clear_outputs(const OutRows& rows, const ScanItem& item, int64_t column) {
  const int lane = threadIdx.x % 32;
  for (int64_t token = item.begin + lane / 16; token < item.end; token += 2) {
    store_scalar(rows.dtype, row_of(rows, token, item.head), column + lane % 16, 0.0f);
  }
}

// ---- the warps that hold the state
// -----------------------------------------------------------------------------------

// Rows g and g + 8 of 16, in the fragments of sums.
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

/// Steps S over a chunk; `values` holds its v, and then its outputs on their way.
template <int kK>
__device__ inline void step_chunk(const ScanStage<kK>& stage, WarpColumns& values, float (&S)[kK / 8][4],
                                  float (&o)[8][4]) {
  const int t = threadIdx.x % 4;
  const ChunkGates& gates = stage.gates;
  const auto pair_of = [&](const float* factors, int tile) {
    return *reinterpret_cast<const float2*>(factors + tile * 8 + 2 * t);
  };
  float u[8][4];
  uint32_t state[kK / 16][4], left[4][4];
  round_sums(S, state);
  fence_products();
  multiply_by_rows<false>(u, state, shared_address(stage.k), false);
  commit_products();
  multiply_by_rows<false>(o, state, shared_address(stage.q), false);
  commit_products();

  wait_products<1>();
  pin(u);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t v[4];
    load_matrices_transposed(columns_address(values, i), v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile = 2 * i + half;
      const float2 factor = pair_of(gates.read, tile);
#pragma unroll
      for (int rows = 0; rows < 2; ++rows) {
        const float2 value = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v[2 * half + rows]));
        left[i][2 * half + rows] =
            pack_bf16(value.x - factor.x * u[tile][2 * rows], value.y - factor.y * u[tile][2 * rows + 1]);
      }
    }
  }
  fence_products();
  multiply_by_rows<true>(u, left, shared_address(stage.inverse), false);
  commit_products();
#pragma unroll
  for (int tile = 0; tile < kK / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) S[tile][i] *= gates.last;
  }
  wait_products<0>();
  pin(u);
  pin(o);

  uint32_t writes[4][4];
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float2 factor = pair_of(gates.write, tile);
    writes[tile / 2][tile % 2 * 2] = pack_bf16(u[tile][0] * factor.x, u[tile][1] * factor.y);
    writes[tile / 2][tile % 2 * 2 + 1] = pack_bf16(u[tile][2] * factor.x, u[tile][3] * factor.y);
  }
  pin(S);
  fence_products();
  multiply_by_columns(S, writes, shared_address(stage.k));
  commit_products();
  round_sums(u, left);
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float2 factor = pair_of(gates.out, tile);
    o[tile][0] *= factor.x, o[tile][1] *= factor.y, o[tile][2] *= factor.x, o[tile][3] *= factor.y;
  }
  pin(o);
  fence_products();
  multiply_by_rows<true>(o, left, shared_address(stage.scores), true);
  commit_products();
  wait_products<0>();
  pin(S);
  pin(o);
}

template <class State, int kK>
__device__ inline void scan_chunks(const ScanKernel& kernel, const ScanItem& item, int n, int64_t column,
                                   const ScanStage<kK>* stages, ScanBarriers& barriers, WarpColumns* values) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const int lane = threadIdx.x % 32;
  const auto rows_of = [&](int slot) {
    return static_cast<State*>(a.state.data) + slot * a.state.stride + (item.head * a.V + column) * kK;
  };
  float S[kK / 8][4] = {};
  if (item.num_chunks > 0) start_values(kernel, item, 0, column, values[0]);
  commit_copies();
  if (a.has_initial_state == nullptr || a.has_initial_state[n]) load_state(rows_of(a.state.read[n]), S);
  StageCursor at;
  for (int c = 0; c < item.num_chunks; ++c) {
    __syncwarp();  // the last outputs have left the columns
    if (c + 1 < item.num_chunks) start_values(kernel, item, c + 1, column, values[(c + 1) % 2]);
    commit_copies();
    wait_copies<1>();
    wait_at(shared_address(&barriers.full[at.stage]), at.parity);
    __syncwarp();
    float o[8][4];
    step_chunk<kK>(stages[at.stage], values[c % 2], S, o);
    __syncwarp();
    if (lane == 0) arrive_at(shared_address(&barriers.empty[at.stage]));
    store_outputs(kernel, item, c, column, o, values[c % 2]);
    at.advance(kernel.num_stages);
  }
  const int slot = a.state.write[n];
  if (slot >= 0) store_state(S, rows_of(slot));
}

template <class State, int kK, int kGroups>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, 1)
    chunk_scan_kernel(const __grid_constant__ ScanKernel kernel) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  auto* stages = reinterpret_cast<ScanStage<kK>*>(shared_memory);
  auto* values = reinterpret_cast<WarpColumns*>(stages + kernel.num_stages);
  auto& barriers = *reinterpret_cast<ScanBarriers*>(values + kGroups * 4 * 2);

  const int warp = threadIdx.x / 32;
  const int64_t v_blocks = a.V / (kGroupRows * kGroups);
  const int64_t column = blockIdx.x % v_blocks * kGroupRows * kGroups + warp * 16;
  const int n = static_cast<int>(blockIdx.x / (v_blocks * a.HV));
  ScanItem item;
  item.head = blockIdx.x / v_blocks % a.HV;
  item.key_head = item.head / (a.HV / a.H);
  item.begin = a.cu_seqlens[n];
  item.end = a.cu_seqlens[n + 1];
  item.chunk = a.chunk_offsets[n];
  item.num_chunks = static_cast<int>((item.end - item.begin + kChunk - 1) / kChunk);
  if (a.state.read[n] < 0) {
    if (warp < kGroups * 4) clear_outputs(a.out, item, column);
    return;
  }
  // What lies above the diagonals is never copied.
  for (int stage = 0; stage < kernel.num_stages; ++stage) {
    for (int i = threadIdx.x; i < 2 * kPanelBytes / kPieceBytes; i += blockDim.x) {
      reinterpret_cast<uint4*>(stages[stage].inverse)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  fence_for_tensor_cores();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kernel.num_stages; ++stage) {
      init_barrier(shared_address(&barriers.full[stage]), kGroupThreads);
      init_barrier(shared_address(&barriers.empty[stage]), kGroups * 4);
    }
  }
  __syncthreads();
  if (warp >= kGroups * 4) {
    if constexpr (kGroups == 2) leave_registers<40>();
    fill_stages<kK>(kernel, item, stages, barriers);
  } else {
    if constexpr (kGroups == 2) take_registers<232>();
    scan_chunks<State, kK>(kernel, item, n, column, stages, barriers, values + warp * 2);
  }
}

}  // namespace xgdn::kernel::cuda
