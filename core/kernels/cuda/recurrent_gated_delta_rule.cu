// SPDX-License-Identifier: Apache-2.0
// A block takes rows of one head of one sequence, a group of lanes a few rows; rows need nothing of each other, so
// there is no shared memory and no barrier. A row stays in registers from its sequence's first token to the last.
#include "core/kernels/cuda/recurrent_gated_delta_rule.h"

#include <algorithm>

#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 128;

// kRows rows of each group.
template <class In, class State, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads)
    rule_kernel(const __grid_constant__ RecurrentGatedDeltaRuleArgs a, int64_t first_sequence) {
  using Layout = RowLayout<State, kDim>;
  using Keys = TokenKeys<State, kDim>;
  constexpr int kGroups = kThreads / Layout::kLanes;
  const int lane = threadIdx.x % Layout::kLanes;
  const int head = blockIdx.y;
  const int key_head = head / static_cast<int>(a.HV / a.H);
  const int64_t n = first_sequence + blockIdx.z;
  const int V = static_cast<int>(a.V);
  // Rows of a group are kGroups apart.
  const int first = static_cast<int>(blockIdx.x) * kGroups * kRows + threadIdx.x / Layout::kLanes;
  const int output = first + Keys::template output_row<kRows>(lane) * kGroups;  // what this lane brings v for
  const bool is_output = Keys::template is_output<kRows>(lane) && output < V;

  const bool is_verification = a.num_accepted != nullptr;
  const int32_t* const slots = is_verification ? a.state.read + n * a.L : nullptr;
  const int64_t begin = a.cu_seqlens == nullptr ? n : a.cu_seqlens[n];
  const int64_t end = a.cu_seqlens == nullptr ? n + 1 : a.cu_seqlens[n + 1];
  const int32_t read = is_verification ? slots[a.num_accepted[n] - 1] : a.state.read[n];
  const bool has_initial_state = a.has_initial_state == nullptr || a.has_initial_state[n];

  RawLaneRow<In, State, kDim> raw_q, raw_k;
  RawScalar raw_v;
  RawGates raw_gates;
  const auto load_token = [&](int64_t token) {
    raw_q.load(row_of<In>(a.q, token, key_head), lane);
    raw_k.load(row_of<In>(a.k, token, key_head), lane);
    raw_v.load(a.v.dtype, row_of(a.v, token, head), min(output, V - 1));
    raw_gates.load(a, token, head);
  };
  if (begin < end) load_token(begin);  // while the slot is on its way
  if (read < 0) {
    for (int64_t token = begin; token < end; ++token) {
      if (is_output) store_scalar(a.out.dtype, row_of(a.out, token, head), output, 0.0f);
    }
    return;
  }

  State* const pool = static_cast<State*>(a.state.data);
  const auto row_in = [&](int32_t slot, int row) {
    return pool + slot * a.state.stride + (static_cast<int64_t>(head) * V + row) * kDim;
  };
  LaneRow<State, kDim> s[kRows] = {};
  if (has_initial_state) {
    RawLaneRow<State, State, kDim> raw[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) raw[r].load_once(row_in(read, min(first + r * kGroups, V - 1)), lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) raw[r].widen(s[r]);
  }

  const auto store_state = [&](int32_t slot) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * kGroups;
      if (slot >= 0 && row < V) s[r].store(row_in(slot, row), lane);
    }
  };
  if (begin == end) {  // the state goes to the slot that is written as it is
    const int32_t write = is_verification ? read : a.state.write[n];
    if (write != read || !has_initial_state) store_state(write);
    return;
  }

  for (int64_t token = begin;;) {
    Keys keys;
    raw_q.widen(keys.q);
    raw_k.widen(keys.k);
    keys.prepare(a.normalise_qk, a.scale);
    const Decay decay = raw_gates.decay(a);
    const float beta = raw_gates.write_strength(a);
    const float o = keys.step(s, decay, beta, raw_v.widened(a.v.dtype), lane);
    if (is_output) store_scalar(a.out.dtype, row_of(a.out, token, head), output, o);
    const bool is_last = token + 1 == end;
    if (is_verification || is_last) store_state(is_verification ? slots[token - begin] : a.state.write[n]);
    if (is_last) return;
    load_token(++token);
  }
}

// Few blocks take a row a group, so that every multiprocessor has some; many take more, which keeps more reads under
// way and loads q and k less often.
template <class In, class State, int kDim>
void launch(const RecurrentGatedDeltaRuleArgs& a, cudaStream_t stream) {
  constexpr int kGroups = kThreads / RowLayout<State, kDim>::kLanes;
  constexpr int kMost = kDim >= 64 ? 4 : 1;
  constexpr int64_t kManyBlocks = 512;
  constexpr int64_t kMostSequences = 65535;  // of a launch
  for (int64_t n = 0; n < a.N; n += kMostSequences) {
    const int64_t count = std::min(a.N - n, kMostSequences);
    const auto grid = [&](int rows) {
      return dim3(static_cast<unsigned>(ceil_div(a.V, kGroups * rows)), static_cast<unsigned>(a.HV),
                  static_cast<unsigned>(count));
    };
    if (count * a.HV * ceil_div(a.V, kGroups * kMost) < kManyBlocks) {
      rule_kernel<In, State, kDim, 1><<<grid(1), kThreads, 0, stream>>>(a, n);
    } else {
      rule_kernel<In, State, kDim, kMost><<<grid(kMost), kThreads, 0, stream>>>(a, n);
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
