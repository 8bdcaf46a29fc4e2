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
//
// Where sequences are cut into pieces (chunk_split.h) the kernel runs twice: without outputs over the pieces ahead of
// cuts, then with outputs over all pieces. A row of S moves through a piece by itself, S <- S M + B, so the rows of M
// are scanned like those of B, from the unit matrix and with V = 0. A piece behind a second or later cut starts with
//
//   S <- S M_i + B_i                  for the pieces from the second to the one ahead of it, in their order
//
// in f32, S and M_i each in two bf16 parts that add up to it within 2^-17, of whose products that of the two low parts
// is left out: with one part for either, the rounding would be that of a chunk's S K^T without the decay behind it.
#pragma once

#include "core/kernels/cuda/chunk_outputs.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"

namespace xgdn::kernel::cuda {

// ---- states ---------------------------------------------------------------------------------------------------------

/// 16 rows of a state, in the fragments of sums. Past the L1: another multiprocessor may have written them just now.
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
        pair = __ldcg(reinterpret_cast<const float2*>(from));
      } else {
        pair = __bfloat1622float2(__ldcg(reinterpret_cast<const __nv_bfloat162*>(from)));
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

/// The state that a sequence starts from.
template <int kTiles>
__device__ inline void load_initial_state(const ScanKernel& kernel, const ScanItem& item, int64_t first_element,
                                          float (&S)[kTiles][4]) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  if (a.has_initial_state != nullptr && !a.has_initial_state[item.n]) return;
  const auto slot = a.state.read[item.n] * a.state.stride + first_element;
  if (a.state.dtype == DType::kFloat32) {
    load_state(static_cast<const float*>(a.state.data) + slot, S);
  } else {
    load_state(static_cast<const __nv_bfloat16*>(a.state.data) + slot, S);
  }
}

template <int kTiles>
__device__ inline void store_final_state(const ScanKernel& kernel, const ScanItem& item, int64_t first_element,
                                         const float (&S)[kTiles][4]) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  if (a.state.write[item.n] < 0) return;
  const auto slot = a.state.write[item.n] * a.state.stride + first_element;
  if (a.state.dtype == DType::kFloat32) {
    store_state(S, static_cast<float*>(a.state.data) + slot);
  } else {
    store_state(S, static_cast<__nv_bfloat16*>(a.state.data) + slot);
  }
}

/// NaN as the last output in the warp's columns, where the state's rows are not finite. The group's threads call
/// together.
template <int kTiles>
__device__ inline void show_overflow(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                     const float (&S)[kTiles][4]) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  const float largest = a.state.dtype == DType::kFloat32 ? kLargestState<float> : kLargestState<__nv_bfloat16>;
  bool is_held = true;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) is_held &= fabsf(S[tile][i]) <= largest;
  }
  sync_group(part.group);  // the output has been stored, by whatever threads
  if (__all_sync(kFullWarp, is_held)) return;
  const int lane = threadIdx.x % 32;
  if (lane < 16) store_scalar(a.out.dtype, row_of(a.out, item.end - 1, item.head), part.column + lane, NAN);
}

/// x in two bf16 parts, pairs as round_sums packs them.
__device__ inline uint2 split_pair(float first, float second) {
  const uint32_t high = pack_bf16(first, second);
  const float2 rounded = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&high));
  return make_uint2(high, pack_bf16(first - rounded.x, second - rounded.y));
}

/// A warp's 16 rows of a map to where map_part finds them.
template <int kTiles>
__device__ inline void store_map(const GroupPart& part, const float (&M)[kTiles][4], char* map) {
  constexpr int kTileBytes = kMapTileBytes<kTiles * 8>;
  const int lane = threadIdx.x % 32;
  char* const rows = map + part.column / 64 * 2 * kTileBytes;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 parts = split_pair(M[tile][2 * half], M[tile][2 * half + 1]);
      char* const to = rows + piece_offset(part.warp * 16 + lane / 4 + 8 * half, tile) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(to) = parts.x;
      *reinterpret_cast<uint32_t*>(to + kTileBytes) = parts.y;
    }
  }
}

template <int kTiles>
__device__ inline void set_unit_rows(const GroupPart& part, float (&M)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_one = tile * 8 + lane % 4 * 2 + i % 2 == static_cast<int>(part.column) + lane / 4 + i / 2 * 8;
      M[tile][i] = is_one ? 1.0f : 0.0f;
    }
  }
}

/// From the state at a sequence's first cut to that at the cut ahead of the piece.
template <int kK, int kGroups>
__device__ inline void jump_to_piece(const ScanKernel& kernel, const ScanItem& item, int64_t first_element,
                                     ScanStage<kK, kGroups>* stages, ScanBarriers& barriers, StageCursor& at,
                                     float (&S)[kK / 8][4]) {
  load_state(kernel.end_of(item.first_cut, item.head) + first_element, S);
  for (int i = 1; i < item.piece; ++i) {
    float sum[kK / 8][4];
    load_state(kernel.end_of(item.first_cut + i, item.head) + first_element, sum);
    uint32_t high[kK / 64][4][4], low[kK / 64][4][4];
#pragma unroll
    for (int tile = 0; tile < kK / 8; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 parts = split_pair(S[tile][2 * half], S[tile][2 * half + 1]);
        high[tile / 8][tile % 8 / 2][tile % 2 * 2 + half] = parts.x;
        low[tile / 8][tile % 8 / 2][tile % 2 * 2 + half] = parts.y;
      }
    }
#pragma unroll
    for (int j = 0; j < kK / 64; ++j) {
      ScanStage<kK, kGroups>& stage = stages[at.stage];
      wait_at(shared_address(&barriers.full[at.stage]), at.parity);
      pin(sum);
      fence_products();
      multiply_by_columns(sum, high[j], shared_address(stage.k));
      multiply_by_columns(sum, low[j], shared_address(stage.k));
      multiply_by_columns(sum, high[j], shared_address(stage.q));
      commit_products();
      wait_products<0>();
      pin(sum);
      arrive_at(shared_address(&barriers.empty[at.stage]));
      at.advance(kernel.num_stages);
    }
#pragma unroll
    for (int tile = 0; tile < kK / 8; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) S[tile][j] = sum[tile][j];
    }
  }
}

// ---- a warp group's rows --------------------------------------------------------------------------------------------

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

template <int kK, int kGroups, bool kByBoxes, bool kHasOutputs>
__device__ inline void scan_chunks(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                   ScanStage<kK, kGroups>* stages, ScanTail<kGroups>& tail, StageCursor& at,
                                   float (&S)[kK / 8][4]) {
  char* panel = tail.out[part.group];
  const uint32_t kept_values = item.is_map ? 0 : 0xffffffffu;
  PackedOutputs packed = {};
  uint32_t state[kK / 16][4];
  round_sums(S, state);
  for (int c = 0; c < item.num_chunks; ++c) {
    ScanStage<kK, kGroups>& stage = stages[at.stage];
    const int count = item.count_of(c);
    wait_at(shared_address(&tail.barriers.full[at.stage]), at.parity);
    if (kByBoxes && count < kChunk) clear_keys<kK>(stage.k, count, part.group);

    const ChunkGates& gates = stage.factors.gates;
    float u[8][4];
    float2 factors[8];
    fence_products();
    multiply_by_rows(u, state, shared_address(stage.k));
    commit_products();
    uint32_t left[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrices_transposed(columns_address(stage.v[part.group], part.warp, i), left[i]);
      if constexpr (!kHasOutputs) {
#pragma unroll
        for (int j = 0; j < 4; ++j) left[i][j] &= kept_values;  // a map's stages have none
      }
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
    if constexpr (kHasOutputs) {
      float o[8][4];
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
      if constexpr (kByBoxes) {
        pack_outputs(DType::kBFloat16, o, packed);
      } else if (kernel.args.out.dtype == DType::kFloat32 || !kernel.is_out_aligned) {
        store_each_output(kernel, item, part, c, o);
      } else {
        pack_outputs(kernel.args.out.dtype, o, packed);
        store_outputs(kernel, item, part, c, packed, panel);
      }
    } else {
      wait_products<0>();
      pin(S);
      arrive_at(shared_address(&tail.barriers.empty[at.stage]));
      round_sums(S, state);
    }
    at.advance(kernel.num_stages);
  }
  if (kHasOutputs && kByBoxes && item.num_chunks > 0) {
    wait_stores_read();
    store_outputs(kernel, item, part, item.num_chunks - 1, packed, panel);
  }
}

/// A piece ahead of a cut: from the sequence's state, from zero or from rows of the unit matrix to memory of the cuts.
template <int kK, int kGroups, bool kByBoxes>
__device__ inline void scan_for_states(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                       ScanStage<kK, kGroups>* stages, ScanTail<kGroups>& tail) {
  const int64_t cut = item.first_cut + item.piece;
  const int64_t first_element = part.column * kK;
  float S[kK / 8][4] = {};
  if (item.is_map) {
    set_unit_rows(part, S);
  } else if (item.piece == 0) {
    load_initial_state(kernel, item, item.head * kernel.args.V * kK + first_element, S);
    store_state(S, kernel.start_of(item.first_cut, item.head) + first_element);
    __threadfence();
  }
  // The scan with outputs may come now: its first pieces find where they start.
  sync_first_groups(kGroups);
  if (threadIdx.x == 0) let_next_kernel_launch();
  StageCursor at;
  scan_chunks<kK, kGroups, kByBoxes, false>(kernel, item, part, stages, tail, at, S);
  if (item.is_map) {
    store_map(part, S, kernel.map_of(cut, item.head));
  } else {
    store_state(S, kernel.end_of(cut, item.head) + first_element);
  }
}

/// A piece, or a whole sequence: from the state that it starts from to the one that the sequence writes.
template <int kK, int kGroups, bool kByBoxes>
__device__ inline void scan_for_outputs(const ScanKernel& kernel, const ScanItem& item, const GroupPart& part,
                                        ScanStage<kK, kGroups>* stages, ScanTail<kGroups>& tail) {
  const int64_t first_element = part.column * kK;
  const int64_t of_slot = item.head * kernel.args.V * kK + first_element;
  StageCursor at;
  float S[kK / 8][4] = {};
  if (item.num_pieces == 1) {
    load_initial_state(kernel, item, of_slot, S);
  } else if (item.piece == 0) {
    load_state(kernel.start_of(item.first_cut, item.head) + first_element, S);
  } else {
    wait_for_kernel_before();  // for what other pieces left
    jump_to_piece<kK>(kernel, item, first_element, stages, tail.barriers, at, S);
  }
  scan_chunks<kK, kGroups, kByBoxes, true>(kernel, item, part, stages, tail, at, S);
  if (item.piece + 1 < item.num_pieces) return;
  store_final_state(kernel, item, of_slot, S);
  if (kernel.args.shows_overflow) show_overflow(kernel, item, part, S);
}

/// Where there are cuts, a scan for states comes between the factors and the scan with outputs. It lets the latter
/// launch when it has itself waited for the factors, so first pieces and whole sequences need not wait for it.
template <int kK, int kGroups, bool kByBoxes, bool kHasOutputs>
__global__ void __launch_bounds__((kGroups + 1) * kGroupThreads, 1)
    chunk_scan_kernel(const __grid_constant__ ScanKernel kernel) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  auto* stages = reinterpret_cast<ScanStage<kK, kGroups>*>(shared_memory);
  auto& tail = *reinterpret_cast<ScanTail<kGroups>*>(stages + kernel.num_stages);

  const int warp = threadIdx.x / 32;
  ScanItem item;
  const bool has_work = find_item<kHasOutputs>(kernel, blockIdx.x, kGroupRows * kGroups, item);
  if constexpr (!kHasOutputs) wait_for_kernel_before();  // with or without work: the next kernel may rely on it
  if (!has_work) return;
  const GroupPart part = {warp / 4, warp % 4, item.column + warp * 16};
  if (a.state.read[item.n] < 0) {
    if (kHasOutputs && warp < kGroups * 4) clear_outputs(a.out, item, part.column);
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
    // For the factors, where no scan for states did so, and for maps.
    if (kHasOutputs && (!kernel.split.cuts() || item.piece > 1)) wait_for_kernel_before();
    if constexpr (!kByBoxes) {
      fill_stages_by_pieces<kK, kGroups, kHasOutputs>(kernel, item, stages, tail.barriers);
    } else if (threadIdx.x == kGroups * kGroupThreads) {
      fill_stages_by_boxes<kK, kGroups, kHasOutputs>(kernel, item, stages, tail.barriers);
    }
  } else {
    if constexpr (kGroups == 2) take_registers<232>();
    if constexpr (kHasOutputs) {
      scan_for_outputs<kK, kGroups, kByBoxes>(kernel, item, part, stages, tail);
    } else {
      scan_for_states<kK, kGroups, kByBoxes>(kernel, item, part, stages, tail);
    }
  }
}

}  // namespace xgdn::kernel::cuda
