// SPDX-License-Identifier: Apache-2.0
// A warp takes rows of one head of one sequence, a group of its lanes a few of them at once; rows need nothing of each
// other, so there is no barrier. A row stays in registers from its sequence's first token to the last.
//
// Pass: the rows that a block works on at once, kRows for each group. All passes of a block lie in one head; those
// behind the current one are on their way to shared memory.
// Ahead of the wait for the kernel before, a block asks the second-level cache for what it will most likely read first:
// the first pass of its rows in the slot that is written down by then, and the token of a sequence of one. It reads
// slot and token again after the wait. That pays with many blocks too: memory gets a warp's rows in one piece.
#include "core/kernels/cuda/recurrent_gated_delta_rule.h"

#include <algorithm>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 128;

// What a head needs of a token, on its way.
template <class In, class State, int kDim>
struct RawToken {
  RawLaneRow<In, State, kDim> q, k;
  RawScalar v;
  RawGates gates;
};

template <class State, int kDim>
struct Token {
  TokenKeys<State, kDim> keys;
  Decay decay;
  float beta, v;

  template <class In>
  __device__ void widen(const RecurrentGatedDeltaRuleArgs& a, const RawToken<In, State, kDim>& raw) {
    raw.q.widen(keys.q);
    raw.k.widen(keys.k);
    keys.prepare(a.normalise_qk, a.scale);
    decay = raw.gates.decay(a);
    beta = raw.gates.write_strength(a);
    v = raw.v.widened(a.v.dtype);
  }
};

// Starts to bring a token to the second-level cache, by the block's first threads.
template <class In, int kDim>
__device__ void prefetch_token(const RecurrentGatedDeltaRuleArgs& a, int64_t t, int key_head, int head) {
  constexpr int kLine = 128;  // bytes
  constexpr int kStep = kLine / static_cast<int>(sizeof(In));
  constexpr int kLines = ceil_div(kDim, kStep);
  const int i = threadIdx.x;
  if (i < 2 * kLines) {
    prefetch_line(row_of<In>(i < kLines ? a.q : a.k, t, key_head) + i % kLines * kStep);
  } else if (i == 2 * kLines) {
    prefetch_line(row_of(a.g, t, head));
  } else if (i == 2 * kLines + 1) {
    prefetch_line(row_of(a.beta, t, head));
  } else if (i >= 32 && (i - 32) * kLine < a.V * size_of(a.v.dtype)) {
    prefetch_line(row_of(a.v, t, head) + (i - 32) * kLine);
  }
}

template <class In, class State, int kDim, int kRows, int kStages, bool kIsVerification>
__global__ void __launch_bounds__(kThreads, kRows == 4 ? 4 : 5)
    rule_kernel(const __grid_constant__ RecurrentGatedDeltaRuleArgs a, int64_t first_sequence, int passes) {
  using Layout = RowLayout<State, kDim>;
  using Keys = TokenKeys<State, kDim>;
  constexpr int kGroups = 32 / Layout::kLanes;  // of a warp
  extern __shared__ uint4 shared[];
  RowsInFlight<State, kDim, kRows, kStages, kThreads, kGroups> on_its_way(shared);

  const int lane = threadIdx.x % Layout::kLanes;
  const int head = blockIdx.y;
  const int key_head = head / static_cast<int>(a.HV / a.H);
  const int64_t n = first_sequence + blockIdx.z;
  const int V = static_cast<int>(a.V);
  // Row i of a group is kGroups i rows behind its first. Lane i brings the v of row i.
  const int warp = static_cast<int>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int first = warp * passes * kRows * kGroups + threadIdx.x % 32 / Layout::kLanes;
  const int num_rows = (V - first + kGroups - 1) / kGroups;  // up to the end of the head

  const auto rows_in = [&](int32_t slot, int row) {
    return static_cast<State*>(a.state.data) + slot * a.state.stride + (static_cast<int64_t>(head) * V + row) * kDim;
  };

  let_next_kernel_launch();
  if constexpr (!kIsVerification) {
    const int32_t slot = __ldcg(a.state.read + n);
    const int row = warp * passes * kRows * kGroups;
    const int count = min(kRows * kGroups, V - row);
    if (threadIdx.x % 32 == 0 && count > 0 && slot >= 0 && slot < a.num_slots) {
      prefetch_row(rows_in(slot, row), static_cast<uint32_t>(count * kDim * static_cast<int>(sizeof(State))));
    }
    if (n < a.T) prefetch_token<In, kDim>(a, n, key_head, head);
  }
  wait_for_kernel_before();

  const int32_t* const slots = a.state.read + n * a.L;  // of a verification
  const int64_t begin = a.cu_seqlens == nullptr ? n : a.cu_seqlens[n];
  const int len = a.cu_seqlens == nullptr ? 1 : static_cast<int>(a.cu_seqlens[n + 1] - begin);
  const int32_t read = kIsVerification ? slots[a.num_accepted[n] - 1] : a.state.read[n];
  const int32_t last_write = kIsVerification ? read : a.state.write[n];
  const bool has_initial_state = a.has_initial_state == nullptr || a.has_initial_state[n];

  RawToken<In, State, kDim> raw;
  const auto load_token = [&](int t) {
    raw.q.load(row_of<In>(a.q, begin + t, key_head), lane);
    raw.k.load(row_of<In>(a.k, begin + t, key_head), lane);
    raw.v.load(a.v.dtype, row_of(a.v, begin + t, head), min(first + lane * kGroups, V - 1));
    raw.gates.load(a, begin + t, head);
  };
  if (len > 0) load_token(0);  // while the slot is on its way
  if (read < 0) {
#pragma unroll 1
    for (int t = 0; t < len; ++t) {
      for (int i = lane; i < min(num_rows, passes * kRows); i += Layout::kLanes) {
        store_scalar(a.out.dtype, row_of(a.out, begin + t, head), first + i * kGroups, 0.0f);
      }
    }
    return;
  }

  constexpr int kPassElements = kRows * kGroups * kDim;
  const auto copy_pass = [&](int pass) {
    if (pass < passes && has_initial_state) {
      on_its_way.copy(pass % kStages, rows_in(read, first) + pass * kPassElements, lane, num_rows - pass * kRows);
    }
    commit_copies();
  };
#pragma unroll
  for (int pass = 0; pass < kStages; ++pass) copy_pass(pass);

  const auto take_pass = [&](int pass, LaneRow<State, kDim>(&s)[kRows]) {
    wait_copies<kStages - 1>();
    if (has_initial_state) on_its_way.widen(pass % kStages, s);
    copy_pass(pass + kStages);
  };
  const auto store_pass = [&](int32_t slot, int pass, const LaneRow<State, kDim>(&s)[kRows]) {
    if (slot < 0) return;
    State* const rows = rows_in(slot, first) + pass * kPassElements;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= num_rows - pass * kRows) continue;
      if constexpr (kIsVerification) {  // writes several states for each that it reads
        s[r].store_once(rows + r * kGroups * kDim, lane);
      } else {
        s[r].store(rows + r * kGroups * kDim, lane);
      }
    }
  };
  const auto step = [&](const Token<State, kDim>& token, int t, int pass, LaneRow<State, kDim>(&s)[kRows]) {
    const int row = lane % kRows;
    const float v = __shfl_sync(0xffffffffu, token.v, pass * kRows + row, Layout::kLanes);
    const float o = token.keys.step(s, token.decay, token.beta, v, lane);
    if (Keys::template is_output<kRows>(lane) && row < num_rows - pass * kRows) {
      store_scalar(a.out.dtype, row_of(a.out, begin + t, head), first + (pass * kRows + row) * kGroups, o);
    }
  };

  if (len == 0) {
    if (last_write == read && has_initial_state) return;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      LaneRow<State, kDim> s[kRows] = {};
      take_pass(pass, s);
      store_pass(last_write, pass, s);
    }
  } else if (len == 1) {
    Token<State, kDim> token;
    token.widen(a, raw);
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      LaneRow<State, kDim> s[kRows] = {};
      take_pass(pass, s);
      step(token, 0, pass, s);
      store_pass(kIsVerification ? slots[0] : last_write, pass, s);
    }
  } else {
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      LaneRow<State, kDim> s[kRows] = {};
      take_pass(pass, s);
#pragma unroll 1
      for (int t = 0; t < len; ++t) {
        const int32_t write = kIsVerification ? slots[t] : t + 1 == len ? last_write : -1;
        Token<State, kDim> token;
        token.widen(a, raw);
        load_token(t + 1 < len ? t + 1 : 0);
        step(token, t, pass, s);
        store_pass(write, pass, s);
      }
    }
  }
}

// Few blocks take few rows, so that every multiprocessor has some; many take more, which loads q and k less often, up
// to what measured best.
template <class In, class State, int kDim>
void launch(const RecurrentGatedDeltaRuleArgs& a, cudaStream_t stream) {
  constexpr int kLanes = RowLayout<State, kDim>::kLanes;
  constexpr int kGroups = kThreads / kLanes;  // of a block
  constexpr int kMost = kDim < 64 ? 1 : kDim == 128 && sizeof(State) == 2 ? 4 : 2;
  constexpr int kMostBytes = sizeof(State) == 4 ? 4096 : 8192;  // of a warp
  constexpr int kPasses = std::min(kLanes / kMost, kMostBytes / RowsInFlight<State, kDim, kMost, 1, 32, 1>::kBytes);
  constexpr int kStages = 2;
  constexpr int64_t kManyBlocks = 512;
  constexpr int64_t kManyHeads = 1024;
  constexpr int64_t kMostSequences = 65535;  // of a launch
  for (int64_t n = 0; n < a.N; n += kMostSequences) {
    const int64_t count = std::min(a.N - n, kMostSequences);
    const auto launch_rows = [&](auto rows, int passes) {
      constexpr int kRows = decltype(rows)::value;
      const auto kernel = a.num_accepted == nullptr ? rule_kernel<In, State, kDim, kRows, kStages, false>
                                                    : rule_kernel<In, State, kDim, kRows, kStages, true>;
      constexpr int kStageBytes = RowsInFlight<State, kDim, kRows, 1, kThreads, 1>::kBytes;
      const dim3 grid(static_cast<unsigned>(ceil_div(a.V, kGroups * kRows * passes)), static_cast<unsigned>(a.HV),
                      static_cast<unsigned>(count));
      launch_overlapping(kernel, grid, kThreads, static_cast<size_t>(kStageBytes * std::min(passes, kStages)), 1,
                         stream, a, n, passes);
    };
    if (count * a.HV * ceil_div(a.V, kGroups * kMost) < kManyBlocks) {
      launch_rows(std::integral_constant<int, 1>(), 1);
    } else {
      launch_rows(std::integral_constant<int, kMost>(), count * a.HV < kManyHeads ? 1 : kPasses);
    }
  }
}

}  // namespace

bool recurrent_supports(int64_t K) {
  return is_key_dim(K);
}

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleArgs& args, cudaStream_t stream) {
  with_element(args.q.dtype, [&](auto in) {
    with_state_element(args.state.dtype, [&](auto state) {
      with_key_dim(args.K, [&](auto dim) { launch<decltype(in), decltype(state), dim()>(args, stream); });
    });
  });
  check_launch("recurrent_gated_delta_rule");
}

}  // namespace xgdn::kernel::cuda
