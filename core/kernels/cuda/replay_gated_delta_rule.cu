// SPDX-License-Identifier: Apache-2.0
// Decode, verification and prompts on replay states are one kernel; replay_rows.cuh has what a block does.
// Verifications of few tokens of many sequences have one of their own, with the same bits: replay_verification.cuh.
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
#include "core/kernels/cuda/replay_verification.cuh"

namespace xgdn::kernel::cuda {
namespace {

// Counts the block, by its first thread, among those that have read the ring. That gets the count before it, in the
// upper bits.
__device__ unsigned count_reader(const ReplayGatedDeltaRuleArgs& a, const ReplaySequence& s) {
  if (threadIdx.x != 0) return 0;
  return atomicAdd(reinterpret_cast<unsigned*>(a.ring.length + s.ring_read), 1u << kRingLengthBits);
}

// Writes the ring's length, and keys where others had to read what was there.
template <class Block>
__device__ void end_ring(const ReplayGatedDeltaRuleArgs& a, const ReplaySequence& s, unsigned readers,
                         const Block& block) {
  if (!s.is_written) return;
  const int32_t length = s.written_length(a.commit);
  if (!s.is_in_place()) {  // nobody reads it
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) a.ring.length[s.ring_write] = length;
    return;
  }
  const bool has_read_last = threadIdx.x == 0 && (readers >> kRingLengthBits) + 1 == gridDim.x * gridDim.y;
  if (has_read_last) a.ring.length[s.ring_write] = length;
  if (s.overwrites() && __syncthreads_or(has_read_last)) block.write_all_keys(s);
}

template <class State, int kDim, class Plan>
__global__ void __launch_bounds__(kReplayThreads, Plan::kBlocks)
    replay_kernel(const __grid_constant__ ReplayPartArgs a, Divisor heads_of_key, int64_t first_sequence) {
  constexpr int kTokens = Plan::kTokens;
  using Block = ReplayBlock<State, kDim, Plan>;
  // Few blocks have bandwidth to spare: they read whole rings, and so need not wait for the lengths.
  constexpr bool kIsEager = Plan::kRows == 1;
  // Whether tokens are loaded ahead of the length: with f32 checkpoints it was measured to be slower.
  constexpr bool kLoadsFirst = kIsEager || sizeof(State) == 2;
  extern __shared__ uint4 shared[];
  __shared__ typename Block::Checkpoint::Barriers barriers;
  const int64_t n = first_sequence + blockIdx.z;
  Block block(a, heads_of_key, shared, barriers);

  begin_overlapped();
  ReplaySequence s(a, n);
  if (s.read < 0) return block.fill_outputs(s.begin, s.len, 0.0f);
  if (s.has_initial_state) {
    block.copy_checkpoint(s.read);
  } else {
    block.clear_checkpoint();
  }
  if constexpr (kIsEager) block.copy_ring(s.ring_read, 0, block.C());
  typename Block::RawTokens raw;
  const auto load_tokens = [&](int t) {
    raw = {};  // nothing is kept of the batch before
    if (t < s.len) block.load_tokens(s, t, raw);
  };
  if constexpr (kLoadsFirst) load_tokens(0);
  s.read_length(a, n);
  if constexpr (!kIsEager) block.copy_ring(s.ring_read, 0, min(s.in_ring, block.C()));
  if constexpr (!kLoadsFirst) load_tokens(0);
  block.set_length(min(s.in_ring, block.C()));

  bool has_begun = false;
  unsigned readers = 0;  // before this block, in the upper bits
  for (int t = 0;;) {
    if (block.room() == 0 && (!has_begun || a.commit || t < s.len)) {
      if (!has_begun) block.wait_for_copies();
      const bool is_finite =
          block.fold(block.C(), s.is_written && block.folded() + block.C() == s.folded ? s.write : -1);
      if (!is_finite && has_begun && a.commit) block.fill_outputs(s.begin + t - 1, 1, NAN);
      if (!has_begun) {  // after a verification
        block.copy_ring(s.ring_read, block.C(), s.in_ring - block.C());
        block.set_length(s.in_ring - block.C());
      }
      load_tokens(t);  // not kept during the fold
    } else if (has_begun && t < s.len) {
      load_tokens(t);
      __syncthreads();  // the batch before has been read
    }
    if (has_begun && t == s.len) break;
    const int count = min(min(kTokens, block.room()), s.len - t);
    if (kIsEager && !has_begun) block.wait_for_copies();  // of rows where tokens go
    if (count > 0) block.stage_tokens(raw, count);
    block.prefetch_tokens(s, t + count);
    block.wait_for_copies();
    if (!has_begun) {
      if (s.is_written && s.is_in_place()) readers = count_reader(a, s);
      if (s.is_written && s.folded == 0 && !(s.has_initial_state && s.write == s.read)) block.store_checkpoint(s.write);
      block.write_old_updates(s);
      block.write_keys(s, 0, block.length());
      has_begun = true;
    }
    if (count == 0) {
      block.wait_for_checkpoint();  // its copy may not outlast the block
      continue;
    }
    float products[kTokens];
    block.multiply(count, products);
    block.write_keys(s, block.length(), count);
    __syncthreads();
    block.add_tokens(s, raw, t, count, products);
    t += count;
  }

  end_ring(a, s, readers, block);
}

template <class State, int kDim, class Plan>
__global__ void __launch_bounds__(kReplayThreads, Plan::kBlocks)
    verification_kernel(const __grid_constant__ ReplayPartArgs a, Divisor heads_of_key, int64_t first_sequence) {
  using Block = VerificationBlock<State, kDim, Plan>;
  extern __shared__ uint4 shared[];
  __shared__ typename Block::Checkpoint::Barriers barriers;
  __shared__ unsigned readers;  // of the first thread, which has no register for it
  const int64_t n = first_sequence + blockIdx.z;
  Block block(a, heads_of_key, shared, barriers);

  begin_overlapped();
  ReplaySequence s(a, n);
  if (s.read < 0) return block.clear_outputs(s);
  block.take_pass(0);
  block.copy_pass(s, 0);
  s.read_length(a, n);
  block.copy_keys(s);
  block.copy_updates(s);
  block.set_length(s.in_ring);
  if (s.len > 0) {
    typename Block::RawTokens raw;
    typename Block::RawValues values;
    block.load_tokens(s, 0, raw);
    block.load_values(s, values);
    if constexpr (Plan::kPasses > 1) block.prefetch_pass(s, 1);
    block.stage_tokens(raw, s.len);
    block.stage_values(values);
  }
  block.wait_for_copies();
  if (s.is_written && s.is_in_place() && threadIdx.x == 0) readers = count_reader(a, s);
  block.write_keys(s);
  if (s.len > 0) block.weigh(s.len);
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; pass < Plan::kPasses; ++pass) {
    const bool is_last = pass + 1 == Plan::kPasses;
    block.step(s, pass, [&] {
      __syncwarp();
      if (!is_last) block.copy_pass(s, pass + 1);
    });
    if (is_last) break;
    block.take_pass(pass + 1);
    block.copy_updates(s);
  }
  end_ring(a, s, readers, block);
}

template <class State, int kDim, class Plan>
__global__ void __launch_bounds__(kReplayThreads)
    materialize_kernel(const __grid_constant__ ReplayGatedDeltaRuleArgs a, Divisor heads_of_key, const int32_t* lengths,
                       int64_t first) {
  using Block = ReplayBlock<State, kDim, Plan>;
  extern __shared__ uint4 shared[];
  __shared__ typename Block::Checkpoint::Barriers barriers;
  const int64_t n = first + blockIdx.z;
  Block block(a, heads_of_key, shared, barriers);
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
// often.
template <class State, int kDim>
constexpr int kMostRows = std::min(4, RowLayout<State, kDim>::kLanes / 2);
constexpr int64_t kManyBlocks = 512;

template <class State, int kDim, int kRows>
constexpr int kBlockRows = ReplayBlock<State, kDim, ReplayPlan<void, kRows, 1, 0, 4>>::kBlockRows;

// A plan that serves any types and C. `run` gets it.
template <class State, int kDim, int kTokens, class Run>
void with_plan(int64_t blocks, const Run& run) {
  if (blocks < kManyBlocks) {
    run(ReplayPlan<void, 1, kTokens, 0, 4>());
  } else {
    run(ReplayPlan<void, kMostRows<State, kDim>, kTokens, 0, 4>());
  }
}

// A plan for what models have, K = 128 and C = 16. Shared memory holds more than 4 blocks of decode; where there are no
// more, their registers go to folds.
template <class State, class In, int kTokens, class Run>
void with_own_plan(int64_t blocks, const Run& run) {
  constexpr int kC = 16, kRows = kMostRows<State, 128>;
  if (blocks < kManyBlocks) return run(ReplayPlan<In, 1, kTokens, kC, 4>());
  if constexpr (kTokens == 1) {
    constexpr int kBlocks = sizeof(State) == 4 ? 5 : 6;
    if (blocks > 4 * num_multiprocessors()) return run(ReplayPlan<In, kRows, kTokens, kC, kBlocks>());
  }
  run(ReplayPlan<In, kRows, kTokens, kC, 4>());
}

// Whether q, k, v and out are of one type.
bool has_one_input_type(const ReplayGatedDeltaRuleArgs& a) {
  return a.k.dtype == a.q.dtype && a.v.dtype == a.q.dtype && a.out.dtype == a.q.dtype;
}

// Calls run(first, count, blocks) for sequences that go into one launch, with their blocks of most rows.
template <class State, int kDim, class Run>
void for_launches(const ReplayGatedDeltaRuleArgs& a, const Run& run) {
  constexpr int64_t kMostSequences = 65535;
  for (int64_t n = 0; n < a.N; n += kMostSequences) {
    const int64_t count = std::min(a.N - n, kMostSequences);
    run(n, count, count * a.HV * ceil_div(a.V, kBlockRows<State, kDim, kMostRows<State, kDim>>));
  }
}

template <class Block>
dim3 grid_of(const ReplayGatedDeltaRuleArgs& a, int64_t sequences) {
  return dim3(static_cast<unsigned>(ceil_div(a.V, Block::kBlockRows)), static_cast<unsigned>(a.HV),
              static_cast<unsigned>(sequences));
}

Divisor heads_of_key(const ReplayGatedDeltaRuleArgs& a) {
  return Divisor(static_cast<uint32_t>(a.HV / a.H));
}

// Whether no sequence has more than `most` tokens, all of them drafts: a ring would have no room.
bool is_short_verification(const ReplayGatedDeltaRuleArgs& a, int64_t most) {
  return !a.commit && a.C == 16 && a.ring.R - a.C <= most && has_one_input_type(a);
}

template <class State, class In, int kTokens, int kPasses>
void launch_passes(const ReplayPartArgs& a, int64_t first, int64_t count, cudaStream_t stream) {
  using Plan = VerificationPlan<In, kMostRows<State, 128>, kTokens, 16, 4, kPasses>;
  using Block = VerificationBlock<State, 128, Plan>;
  launch_overlapping(verification_kernel<State, 128, Plan>, grid_of<Block>(a, count), kReplayThreads, Block::bytes(a.C),
                     1, stream, a, heads_of_key(a), first);
}

// Two passes share what tokens need beside S; where there are few blocks, half as many would leave multiprocessors
// without one.
template <class State, class In, int kTokens>
void launch_verification(const ReplayPartArgs& a, int64_t first, int64_t count, int64_t blocks, cudaStream_t stream) {
  constexpr int64_t kBlocksForPasses = 4096;
  if (blocks < kBlocksForPasses) return launch_passes<State, In, kTokens, 1>(a, first, count, stream);
  launch_passes<State, In, kTokens, 2>(a, first, count, stream);
}

// Calls f with an element of the checkpoints and with K.
template <class F>
void with_sizes(const ReplayGatedDeltaRuleArgs& a, const F& f) {
  with_state_element(a.state.dtype, [&](auto state) { with_key_dim(a.K, [&](auto dim) { f(state, dim); }); });
}

}  // namespace

void replay_gated_delta_rule(const ReplayPartArgs& args, int64_t T, cudaStream_t stream) {
  with_sizes(args, [&](auto state, auto dim) {
    using State = decltype(state);
    constexpr int kDim = dim();
    const auto launch = [&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      for_launches<State, kDim>(args, [&](int64_t first, int64_t count, int64_t blocks) {
        const auto run = [&](auto plan) {
          using Plan = decltype(plan);
          launch_overlapping(replay_kernel<State, kDim, Plan>, grid_of<ReplayBlock<State, kDim, Plan>>(args, count),
                             kReplayThreads, ReplayBlock<State, kDim, Plan>::bytes(args.C), 1, stream, args,
                             heads_of_key(args), first);
        };
        if constexpr (kDim == 128 && kTokens > 1) {
          if (is_short_verification(args, kTokens) && blocks >= kManyBlocks) {
            return with_element(args.q.dtype, [&](auto in) {
              launch_verification<State, decltype(in), kTokens>(args, first, count, blocks, stream);
            });
          }
        }
        if constexpr (kDim == 128) {
          if (args.C == 16 && has_one_input_type(args)) {
            return with_element(args.q.dtype,
                                [&](auto in) { with_own_plan<State, decltype(in), kTokens>(blocks, run); });
          }
        }
        with_plan<State, kDim, kTokens>(blocks, run);
      });
    };
    if (T <= args.N) {
      launch(std::integral_constant<int, 1>());
    } else {
      launch(std::integral_constant<int, std::min(4, RowLayout<State, kDim>::kLanes / 2)>());
    }
  });
  check_launch("replay_gated_delta_rule");
}

void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, cudaStream_t stream) {
  with_sizes(args, [&](auto state, auto dim) {
    using State = decltype(state);
    constexpr int kDim = dim();
    for_launches<State, kDim>(args, [&](int64_t first, int64_t count, int64_t blocks) {
      with_plan<State, kDim, 1>(blocks, [&](auto plan) {
        using Plan = decltype(plan);
        launch_overlapping(materialize_kernel<State, kDim, Plan>, grid_of<ReplayBlock<State, kDim, Plan>>(args, count),
                           kReplayThreads, ReplayBlock<State, kDim, Plan>::bytes(args.C), 1, stream, args,
                           heads_of_key(args), lengths, first);
      });
    });
  });
  check_launch("materialize_state");
}

}  // namespace xgdn::kernel::cuda
