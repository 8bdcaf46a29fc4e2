// SPDX-License-Identifier: Apache-2.0
// Decode, verification and prompts on replay states are one kernel; replay_rows.cuh has what a block does.
//
// Blocks of a sequence share its ring: the keys (and the gates of a head), and its length. Each reads them once, at its
// begin. Where what is written would overwrite what others still read, the last block to have read writes. Blocks are
// counted in the length's upper bits, which only such a sequence's blocks touch.
#include "core/kernels/cuda/replay_gated_delta_rule.h"

#include <algorithm>
#include <cmath>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/replay_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

template <class State, int kDim, int kRows, int kTokens>
__global__ void __launch_bounds__(kReplayThreads, 4)
    replay_kernel(const __grid_constant__ ReplayGatedDeltaRuleArgs a, int64_t first_sequence) {
  // Few blocks have bandwidth to spare: they read whole rings, and so need not wait for the lengths.
  constexpr bool kIsEager = kRows == 1;
  extern __shared__ uint4 shared[];
  const auto C = static_cast<int>(a.C);
  const int64_t n = first_sequence + blockIdx.z;
  ReplayBlock<State, kDim, kRows, kTokens> block(a, shared);

  begin_overlapped();
  ReplaySequence s(a, n);
  if (s.read < 0) return block.fill_outputs(s.begin, s.len, 0.0f);
  if (s.has_initial_state) {
    block.copy_checkpoint(s.read);
  } else {
    block.clear_checkpoint();
  }
  if constexpr (kIsEager) block.copy_ring(s.ring_read, 0, C);
  s.read_length(a, n);
  block.load_tokens(s, 0);
  if constexpr (!kIsEager) block.copy_ring(s.ring_read, 0, min(s.in_ring, C));
  block.set_length(min(s.in_ring, C));

  bool has_begun = false, has_read_last = false;
  for (int t = 0;;) {
    if (block.room() == 0 && (!has_begun || a.commit || t < s.len)) {
      if (!has_begun) block.wait_for_copies();
      const bool is_finite = block.fold(C, s.is_written && block.folded() + C == s.folded ? s.write : -1);
      if (!is_finite && has_begun && a.commit) block.fill_outputs(s.begin + t - 1, 1, NAN);
      if (!has_begun) {  // after a verification
        block.copy_ring(s.ring_read, C, s.in_ring - C);
        block.set_length(s.in_ring - C);
      }
    }
    if (has_begun && t == s.len) break;
    const int count = min(min(kTokens, block.room()), s.len - t);
    if (kIsEager && !has_begun) block.wait_for_copies();  // of rows where tokens go
    if (count > 0) block.stage_tokens(count);
    block.load_tokens(s, t + count);
    block.wait_for_copies();
    if (!has_begun) {
      if (s.is_written && s.is_in_place() && threadIdx.x == 0) {
        const unsigned before =
            atomicAdd(reinterpret_cast<unsigned*>(a.ring.length + s.ring_read), 1u << kRingLengthBits);
        has_read_last = (before >> kRingLengthBits) + 1 == gridDim.x * gridDim.y;
      }
      if (s.is_written && s.folded == 0 && !(s.has_initial_state && s.write == s.read)) block.store_checkpoint(s.write);
      block.write_old_updates(s);
      block.write_keys(s, 0, block.length());
      has_begun = true;
    }
    if (count == 0) continue;
    float products[kTokens];
    block.multiply(count, products);
    block.write_keys(s, block.length(), count);
    __syncthreads();
    block.add_tokens(s, t, count, products);
    t += count;
  }

  if (!s.is_written) return;
  const int32_t length = s.written_length(a.commit);
  if (!s.is_in_place()) {  // nobody reads it
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) a.ring.length[s.ring_write] = length;
  } else if (__syncthreads_or(has_read_last)) {
    if (threadIdx.x == 0) a.ring.length[s.ring_write] = length;
    if (s.overwrites()) block.write_all_keys(s);
  }
}

template <class State, int kDim, int kRows>
__global__ void __launch_bounds__(kReplayThreads)
    materialize_kernel(const __grid_constant__ ReplayGatedDeltaRuleArgs a, const int32_t* lengths, int64_t first) {
  extern __shared__ uint4 shared[];
  const int64_t n = first + blockIdx.z;
  ReplayBlock<State, kDim, kRows, 1> block(a, shared);
  begin_overlapped();
  const int32_t read = a.state.read[n], write = a.state.write[n], count = lengths[n];
  if (read < 0 || write < 0) return;
  block.copy_checkpoint(read);
  block.copy_ring(a.ring.read[n], 0, count);
  block.wait_for_copies();
  if (count == 0) return block.store_checkpoint(write);
  block.fold(count, write);
}

// Few blocks take few rows, so that every multiprocessor has some; many take more, which read the ring's keys less
// often. `run` gets a block, its grid and the first sequence, for at most kMostSequences at once.
template <class State, int kDim, int kTokens, class Run>
void launch(const ReplayGatedDeltaRuleArgs& a, const Run& run) {
  constexpr int kMost = std::min(4, RowLayout<State, kDim>::kLanes / 2);
  constexpr int64_t kManyBlocks = 512;
  constexpr int64_t kMostSequences = 65535;
  for (int64_t n = 0; n < a.N; n += kMostSequences) {
    const int64_t count = std::min(a.N - n, kMostSequences);
    const auto launch_rows = [&](auto rows) {
      using Block = ReplayBlock<State, kDim, decltype(rows)::value, kTokens>;
      const dim3 grid(static_cast<unsigned>(ceil_div(a.V, Block::kBlockRows)), static_cast<unsigned>(a.HV),
                      static_cast<unsigned>(count));
      run(rows, grid, Block::bytes(a.C), n);
    };
    const int64_t blocks = count * a.HV * ceil_div(a.V, ReplayBlock<State, kDim, kMost, kTokens>::kBlockRows);
    if (blocks < kManyBlocks) {
      launch_rows(std::integral_constant<int, 1>());
    } else {
      launch_rows(std::integral_constant<int, kMost>());
    }
  }
}

// Calls f with an element of the checkpoints and with K.
template <class F>
void with_sizes(const ReplayGatedDeltaRuleArgs& a, const F& f) {
  with_state_element(a.state.dtype, [&](auto state) { with_key_dim(a.K, [&](auto dim) { f(state, dim); }); });
}

}  // namespace

void replay_gated_delta_rule(const ReplayGatedDeltaRuleArgs& args, int64_t T, cudaStream_t stream) {
  with_sizes(args, [&](auto state, auto dim) {
    using State = decltype(state);
    constexpr int kDim = dim();
    const auto launch_batches = [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      launch<State, kDim, kTokens>(args, [&](auto rows, dim3 grid, size_t bytes, int64_t first) {
        launch_overlapping(replay_kernel<State, kDim, decltype(rows)::value, kTokens>, grid, kReplayThreads, bytes, 1,
                           stream, args, first);
      });
    };
    if (T <= args.N) {
      launch_batches(std::integral_constant<int, 1>());
    } else {
      launch_batches(std::integral_constant<int, std::min(4, RowLayout<State, kDim>::kLanes / 2)>());
    }
  });
  check_launch("replay_gated_delta_rule");
}

void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, cudaStream_t stream) {
  with_sizes(args, [&](auto state, auto dim) {
    using State = decltype(state);
    constexpr int kDim = dim();
    launch<State, kDim, 1>(args, [&](auto rows, dim3 grid, size_t bytes, int64_t first) {
      launch_overlapping(materialize_kernel<State, kDim, decltype(rows)::value>, grid, kReplayThreads, bytes, 1, stream,
                         args, lengths, first);
    });
  });
  check_launch("materialize_state");
}

}  // namespace xgdn::kernel::cuda
