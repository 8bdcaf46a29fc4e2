// SPDX-License-Identifier: Apache-2.0
// A sequence's tokens in three parts, of which any may be empty; with r tokens in its ring:
//
//   head     the tokens that fill the ring, -r mod C: replay_gated_delta_rule, which folds it
//   middle   whole multiples of C: chunk_gated_delta_rule, from the checkpoint to the checkpoint
//   tail     what is left: replay_gated_delta_rule, which leaves it in the ring
//
// Where the parts begin follows from the lengths of rings, so a kernel finds it on the device, and a call may be
// captured. It also numbers the chunks of the middles: those of sequence n from cu_seqlens[n] / 64 + n on, which leaves
// room for as many as its tokens could have, without a sum over sequences.
//
// A sequence whose middle would be short, or that writes nothing, has no middle: all of it is head. So where a sequence
// is cut depends on itself alone, and its bits on no other one.
#include "core/kernels/cuda/replay_prompt.h"

#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/chunk_tiles.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/replay_gated_delta_rule.h"
#include "core/kernels/cuda/replay_sequence.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kMinMiddle = 32;  // tokens; of 16, batches were no quicker
constexpr int kThreads = 128;
constexpr int32_t kNoSlot = -1;

/// What the parts' kernels are given, written on the device.
struct Parts {
  int32_t* head_begin;    // [N]
  int32_t* middle_begin;  // [N]
  int32_t* tail_begin;    // [N]
  int32_t* tail_end;      // [N]
  // Slots of the checkpoints that parts read, negative where a sequence does not have the part.
  int32_t* head_read;      // [N]
  int32_t* middle_read;    // [N]
  int32_t* tail_read;      // [N]
  int32_t* chunk_offsets;  // [N+1]
  int32_t* chunk_indices;  // [M, 2]

  static constexpr int kRows = 7;
};

int64_t num_chunks(const ReplayPromptArgs& a) {
  return a.T / kChunk + a.N;
}

__global__ void __launch_bounds__(kThreads)
    divide_kernel(const __grid_constant__ ReplayPartArgs a, const __grid_constant__ Parts parts, int64_t M) {
  begin_overlapped();
  const int64_t n = blockIdx.x;
  const auto first_row = static_cast<int64_t>(a.cu_seqlens[n]) / kChunk + n;
  if (threadIdx.x == 0) parts.chunk_offsets[n] = static_cast<int32_t>(first_row);
  int64_t end_row = M;
  int chunks = 0;
  if (n < a.N) {
    end_row = static_cast<int64_t>(a.cu_seqlens[n + 1]) / kChunk + n + 1;
    ReplaySequence s(a, n);
    const auto C = static_cast<int>(a.C);
    int head = s.len, middle = 0;
    bool has_head = true;
    if (s.is_written) {
      s.read_length(a, n);
      const int room = -s.in_ring & (C - 1);  // C is a power of two
      const int whole = s.len > room ? (s.len - room) & -C : 0;
      if (whole >= kMinMiddle) {
        head = room;
        middle = whole;
        has_head = s.in_ring > 0;
      }
    }
    chunks = (middle + kChunk - 1) / kChunk;
    __syncthreads();  // all have read the length
    if (threadIdx.x == 0) {
      const auto begin = static_cast<int32_t>(s.begin);
      parts.head_begin[n] = begin;
      parts.middle_begin[n] = begin + head;
      parts.tail_begin[n] = begin + head + middle;
      parts.tail_end[n] = begin + s.len;
      parts.head_read[n] = has_head ? s.read : kNoSlot;
      parts.middle_read[n] = middle == 0 ? kNoSlot : has_head ? s.write : s.read;
      parts.tail_read[n] = head + middle < s.len ? s.write : kNoSlot;
      if (!has_head) a.ring.length[s.ring_write] = 0;  // a head would have left that
    }
  }
  for (int64_t row = first_row + threadIdx.x; row < end_row; row += kThreads) {
    const bool is_chunk = row - first_row < chunks;
    parts.chunk_indices[2 * row] = is_chunk ? static_cast<int32_t>(n) : -1;
    parts.chunk_indices[2 * row + 1] = is_chunk ? static_cast<int32_t>(row - first_row) : -1;
  }
}

Parts parts_at(const ReplayPromptArgs& a, void* memory) {
  auto* next = static_cast<int32_t*>(memory);
  const auto take = [&](int64_t count) {
    int32_t* const taken = next;
    next += count;
    return taken;
  };
  Parts parts = {};
  for (int32_t** row : {&parts.head_begin, &parts.middle_begin, &parts.tail_begin, &parts.tail_end, &parts.head_read,
                        &parts.middle_read, &parts.tail_read}) {
    *row = take(a.N);
  }
  parts.chunk_offsets = take(a.N + 1);
  parts.chunk_indices = take(2 * num_chunks(a));
  return parts;
}

size_t parts_bytes(const ReplayPromptArgs& a) {
  return sizeof(int32_t) * (Parts::kRows * a.N + a.N + 1 + 2 * num_chunks(a));
}

ChunkGatedDeltaRuleArgs middle_of(const ReplayPromptArgs& a, const Parts& parts) {
  ChunkGatedDeltaRuleArgs middle = {a};
  middle.cu_seqlens = parts.middle_begin;
  middle.ends = parts.tail_begin;
  middle.state.read = parts.middle_read;
  middle.has_initial_state = a.has_initial_state;
  middle.shows_overflow = true;
  middle.T = a.T;
  middle.M = num_chunks(a);
  middle.max_len = a.max_len;
  middle.chunk_indices = parts.chunk_indices;
  middle.chunk_offsets = parts.chunk_offsets;
  return middle;
}

// The workspace: that of the middles, then the parts.
size_t middle_bytes(const ReplayPromptArgs& a) {
  return (workspace_bytes(middle_of(a, {})) + 15) / 16 * 16;
}

}  // namespace

bool replay_prompt_supports(const ReplayPromptArgs& args) {
  return args.commit && args.N > 0 && args.max_len >= kMinMiddle && chunk_supports(args.K, args.V);
}

size_t workspace_bytes(const ReplayPromptArgs& args) {
  return middle_bytes(args) + parts_bytes(args);
}

void replay_prompt(const ReplayPromptArgs& args, cudaStream_t stream) {
  const Parts parts = parts_at(args, static_cast<char*>(args.workspace) + middle_bytes(args));
  const ReplayPartArgs whole = {args, args.cu_seqlens + 1};
  launch_overlapping(divide_kernel, dim3(static_cast<unsigned>(args.N + 1)), kThreads, 0, 1, stream, whole, parts,
                     num_chunks(args));
  check_launch("replay_gated_delta_rule");

  ReplayPartArgs head = whole;
  head.cu_seqlens = parts.head_begin;
  head.ends = parts.middle_begin;
  head.state.read = parts.head_read;
  replay_gated_delta_rule(head, args.T, stream);

  ChunkGatedDeltaRuleArgs middle = middle_of(args, parts);
  middle.workspace = args.workspace;
  chunk_gated_delta_rule(middle, stream);

  ReplayPartArgs tail = whole;
  tail.cu_seqlens = parts.tail_begin;
  tail.ends = parts.tail_end;
  tail.state.read = parts.tail_read;
  tail.ring.read = args.ring.write;
  tail.num_accepted = nullptr;
  tail.has_initial_state = nullptr;
  replay_gated_delta_rule(tail, args.T, stream);
}

}  // namespace xgdn::kernel::cuda
