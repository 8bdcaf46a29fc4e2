// SPDX-License-Identifier: Apache-2.0
// A sequence's tokens go two ways, in three steps:
//
//   fold     materialize_state writes the state after the tokens in the ring to the checkpoint's slot
//   middle   all tokens up to the last multiple of C: chunk_gated_delta_rule, from that state to the checkpoint
//   rest     what is left, fewer than C: replay_gated_delta_rule, which leaves it in the ring
//
// Where the rest begins follows from the lengths of rings, so a kernel finds it on the device, and a call may be
// captured. It also numbers the chunks of the middles: those of sequence n from cu_seqlens[n] / 64 + n on, which leaves
// room for as many as its tokens could have, without a sum over sequences.
//
// A sequence stays whole, and is all rest, if its middle would be short, if it writes nothing, or if with the drafts
// that count it has more than C tokens. That depends on the sequence alone, and so do its bits.
#include "core/kernels/cuda/replay_prompt.h"

#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/replay_gated_delta_rule.h"
#include "core/kernels/cuda/replay_sequence.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kMinMiddle = 32;  // tokens; from 27 on the chunk kernels were quicker in batches of any size
constexpr int kThreads = 128;
constexpr int32_t kNoSlot = -1;

/// What the steps are given, written on the device. A step skips a sequence where it reads no slot.
struct Tables {
  int32_t* rest_begin;     // [N]
  int32_t* fold_read;      // [N]  slots of checkpoints
  int32_t* middle_read;    // [N]
  int32_t* rest_read;      // [N]
  int32_t* rest_ring;      // [N]  the slot of the ring
  int32_t* in_ring;        // [N]  tokens
  int32_t* rest_accepted;  // [N]  drafts
  int32_t* chunk_offsets;  // [N+1]
  int32_t* chunk_indices;  // [M, 2]
  bool* rest_has_state;    // [N]

  static constexpr int kRows = 7;
};

int64_t num_chunks(const ReplayPromptArgs& a) {
  return a.T / kChunk + a.N;
}

__global__ void __launch_bounds__(kThreads)
    divide_kernel(const __grid_constant__ ReplayPartArgs a, const __grid_constant__ Tables tables, int64_t M) {
  begin_overlapped();
  const int64_t n = blockIdx.x;
  const auto first_row = static_cast<int64_t>(a.cu_seqlens[n]) / kChunk + n;
  if (threadIdx.x == 0) tables.chunk_offsets[n] = static_cast<int32_t>(first_row);
  int64_t end_row = M;
  int chunks = 0;
  if (n < a.N) {
    end_row = static_cast<int64_t>(a.cu_seqlens[n + 1]) / kChunk + n + 1;
    ReplaySequence s(a, n);
    const auto C = static_cast<int>(a.C);
    int middle = 0;
    if (s.is_written) {
      s.read_length(a, n);
      middle = s.len - ((s.in_ring + s.len) & (C - 1));  // C is a power of two
      if (middle < kMinMiddle || s.in_ring > C) middle = 0;
    }
    const bool is_whole = middle == 0, has_fold = !is_whole && s.in_ring > 0;
    chunks = (middle + kChunk - 1) / kChunk;
    __syncthreads();  // all have read the length
    if (threadIdx.x == 0) {
      tables.rest_begin[n] = static_cast<int32_t>(s.begin) + middle;
      tables.fold_read[n] = has_fold ? s.read : kNoSlot;
      tables.middle_read[n] = is_whole ? kNoSlot : has_fold ? s.write : s.read;
      tables.rest_read[n] = is_whole ? s.read : middle < s.len ? s.write : kNoSlot;
      tables.rest_ring[n] = is_whole ? s.ring_read : s.ring_write;
      tables.in_ring[n] = has_fold ? s.in_ring : 0;
      tables.rest_accepted[n] = is_whole && a.num_accepted != nullptr ? a.num_accepted[n] : 0;
      tables.rest_has_state[n] = !is_whole || s.has_initial_state;
      if (!is_whole) a.ring.length[s.ring_write] = 0;  // the tokens that it had are in the state
    }
  }
  for (int64_t row = first_row + threadIdx.x; row < end_row; row += kThreads) {
    const bool is_chunk = row - first_row < chunks;
    tables.chunk_indices[2 * row] = is_chunk ? static_cast<int32_t>(n) : -1;
    tables.chunk_indices[2 * row + 1] = is_chunk ? static_cast<int32_t>(row - first_row) : -1;
  }
}

Tables tables_at(const ReplayPromptArgs& a, void* memory) {
  auto* next = static_cast<int32_t*>(memory);
  const auto take = [&](int64_t count) {
    int32_t* const taken = next;
    next += count;
    return taken;
  };
  Tables tables = {};
  for (int32_t** row : {&tables.rest_begin, &tables.fold_read, &tables.middle_read, &tables.rest_read,
                        &tables.rest_ring, &tables.in_ring, &tables.rest_accepted}) {
    *row = take(a.N);
  }
  tables.chunk_offsets = take(a.N + 1);
  tables.chunk_indices = take(2 * num_chunks(a));
  tables.rest_has_state = reinterpret_cast<bool*>(next);
  return tables;
}

size_t table_bytes(const ReplayPromptArgs& a) {
  return sizeof(int32_t) * (Tables::kRows * a.N + a.N + 1 + 2 * num_chunks(a)) + sizeof(bool) * a.N;
}

ReplayGatedDeltaRuleArgs fold_of(const ReplayPromptArgs& a, const Tables& tables) {
  ReplayGatedDeltaRuleArgs fold = a;
  fold.state.read = tables.fold_read;
  return fold;
}

ChunkGatedDeltaRuleArgs middle_of(const ReplayPromptArgs& a, const Tables& tables) {
  ChunkGatedDeltaRuleArgs middle = {a};
  middle.ends = tables.rest_begin;
  middle.state.read = tables.middle_read;
  middle.has_initial_state = a.has_initial_state;
  middle.shows_overflow = true;
  middle.T = a.T;
  middle.M = num_chunks(a);
  middle.max_len = a.max_len;
  middle.chunk_indices = tables.chunk_indices;
  middle.chunk_offsets = tables.chunk_offsets;
  middle.workspace = a.workspace;
  return middle;
}

ReplayPartArgs rest_of(const ReplayPromptArgs& a, const Tables& tables) {
  ReplayPartArgs rest = {a, a.cu_seqlens + 1};
  rest.cu_seqlens = tables.rest_begin;
  rest.state.read = tables.rest_read;
  rest.ring.read = tables.rest_ring;
  rest.num_accepted = tables.rest_accepted;
  rest.has_initial_state = tables.rest_has_state;
  return rest;
}

// The workspace: that of the middles, then the tables.
size_t middle_bytes(const ReplayPromptArgs& a) {
  return (workspace_bytes(middle_of(a, {})) + 15) / 16 * 16;
}

}  // namespace

bool replay_prompt_supports(const ReplayPromptArgs& args) {
  return args.commit && args.N > 0 && args.max_len >= kMinMiddle && chunk_supports(args.K, args.V);
}

size_t workspace_bytes(const ReplayPromptArgs& args) {
  return middle_bytes(args) + table_bytes(args);
}

void replay_prompt(const ReplayPromptArgs& args, cudaStream_t stream) {
  const Tables tables = tables_at(args, static_cast<char*>(args.workspace) + middle_bytes(args));
  launch_overlapping(divide_kernel, dim3(static_cast<unsigned>(args.N + 1)), kThreads, 0, 1, stream,
                     ReplayPartArgs{args, args.cu_seqlens + 1}, tables, num_chunks(args));
  check_launch("replay_gated_delta_rule");
  materialize_state(fold_of(args, tables), tables.in_ring, stream);
  chunk_gated_delta_rule(middle_of(args, tables), stream);
  replay_gated_delta_rule(rest_of(args, tables), args.T, stream);
}

}  // namespace xgdn::kernel::cuda
