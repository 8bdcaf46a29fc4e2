// SPDX-License-Identifier: Apache-2.0
// A cluster of blocks takes a key head of a sequence with all of its value heads. Each block convolves q and k for
// itself and the values of its own rows; the blocks of a value head share the sum of squares of its norm.
//
// Pass: the rows that a block works on at once, kRows for each group of lanes. Passes never reach into another head;
// those behind the current one are on their way to shared memory.
// Order: all blocks of a cluster have read the history of q and k before one of them writes it.
// Rounding: as if the ops ran one after the other: q, k, v and o are rounded to the type of the activations between
// them. The sum of squares adds passes in order, so bits do not depend on the size of the cluster.
#include "core/kernels/cuda/gdn_decode_step.h"

#include <cooperative_groups.h>

#include "core/kernels/cuda/conv_taps.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 128;
constexpr int kMostCluster = 8;
constexpr int kMostPasses = 256;      // of a key head
constexpr int kMostHeads = kThreads;  // of a key head

struct Step {
  DecodeStepArgs args;
  int rows_of_head;     // V, or more: a whole number of passes
  int passes;           // of a key head
  int passes_of_block;  // of a block of the cluster, at most
};

template <class State, int kDim>
constexpr int kGroups = kThreads / RowLayout<State, kDim>::kLanes;

// Rows of a group in a pass.
template <int kDim>
constexpr int kRowsOfGroup = kDim == 64 || kDim == 128 ? 2 : 1;

template <class State, int kDim>
constexpr int kStages = sizeof(State) == 2 ? 4 : 2;

template <class State, int kDim>
using Rows = RowsInFlight<State, kDim, kRowsOfGroup<kDim>, kStages<State, kDim>, kThreads, kGroups<State, kDim>>;

// A row of a value head between the convolution and the norm.
struct Row {
  float x;  // v, and then o
  float weight, gate;
};

// What a block did before it arrives is visible to those that wait. Nothing without clusters.
__device__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  cg::this_cluster().barrier_arrive();
#endif
}
__device__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  cg::this_cluster().barrier_wait();
#endif
}

struct HeadGates {
  Decay decay;
  float beta;
};

template <class In, class State, int kDim>
__global__ void __launch_bounds__(kThreads, 5) step_kernel(const __grid_constant__ Step step) {
  using Layout = RowLayout<State, kDim>;
  using Keys = TokenKeys<State, kDim>;
  constexpr int kRows = kRowsOfGroup<kDim>;
  constexpr int kPassRows = kGroups<State, kDim> * kRows;
  constexpr int kKeyChannels = (2 * kDim + kThreads - 1) / kThreads;  // of a thread
  const CausalConv1dArgs& conv = step.args.conv;
  const TokenDeltaRuleArgs& rule = step.args.rule;
  const RmsNormGatedArgs& norm = step.args.norm;

  __shared__ __align__(16) float keys[2][kDim];                     // q, k
  __shared__ float squares[kMostPasses];                            // of o, summed over each pass
  __shared__ HeadGates gates[kMostHeads];                           // of the value heads of the block
  __shared__ float histories[kKeyChannels][kMaxHistory][kThreads];  // of q and k as they will be
  extern __shared__ uint4 shared[];
  Rows<State, kDim> on_its_way(shared);
  Row* const rows = reinterpret_cast<Row*>(reinterpret_cast<char*>(shared) + Rows<State, kDim>::kBytes);  // the block's

#if __CUDA_ARCH__ >= 900
  const int cluster = static_cast<int>(cg::this_cluster().num_blocks());
  const int rank = static_cast<int>(cg::this_cluster().block_rank());
#else
  constexpr int cluster = 1, rank = 0;
#endif
  const int key_head = blockIdx.y;
  const int64_t n = blockIdx.z;
  const int ratio = static_cast<int>(rule.HV / rule.H);
  const int V = static_cast<int>(rule.V);
  const int passes_of_head = step.rows_of_head / kPassRows;
  const int first_pass = rank * step.passes_of_block;
  const int num_passes = max(min(step.passes_of_block, step.passes - first_pass), 0);
  const int num_rows = num_passes * kPassRows;
  const int lane = threadIdx.x % Layout::kLanes;
  const int group = threadIdx.x / Layout::kLanes;

  // Row i of the block, as a row of a value head.
  struct Place {
    int head, row;
  };
  const auto place_of = [&](int i) {
    const int in_key_head = first_pass * kPassRows + i;
    const int head = in_key_head / step.rows_of_head;
    return Place{key_head * ratio + head, in_key_head - head * step.rows_of_head};
  };
  const auto advance = [&](Place& place) {  // by a pass
    place.row += kPassRows;
    if (place.row >= step.rows_of_head) place.row -= step.rows_of_head, ++place.head;
  };
  const int first_head = place_of(0).head;

  begin_overlapped();
  const int32_t read = rule.state.read[n], write = rule.state.write[n];
  const int32_t conv_read = conv.conv_state.read[n], conv_write = conv.conv_state.write[n];

  // ---- what does not depend on the slot ----
  const auto key_channel = [&](int j) {
    const int i = min(j * kThreads + static_cast<int>(threadIdx.x), 2 * kDim - 1);
    return static_cast<int64_t>(i / kDim * static_cast<int>(rule.H) + key_head) * kDim + i % kDim;
  };
  const auto value_channel = [&](Place place) {
    return 2 * rule.H * kDim + static_cast<int64_t>(place.head) * V + place.row;
  };
  RawConv<In> raw_keys[kKeyChannels];
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) raw_keys[j].load_inputs(conv, n, key_channel(j));
  RawConv<In> raw_value;
  In raw_z;
  RawScalar raw_weight;
  const auto load_row = [&](Place place) {
    raw_value.load_inputs(conv, n, value_channel(place));
    raw_z = row_of<In>(norm.z, n, place.head)[place.row];
    raw_weight.load(norm.weight.dtype, norm.weight.data, place.row);
  };
  const auto is_row = [&](int i) { return i < num_rows && place_of(i).row < V; };
  if (is_row(threadIdx.x)) load_row(place_of(threadIdx.x));
  const int gated = kThreads - 1 - static_cast<int>(threadIdx.x);  // the head whose gates this thread prepares
  const bool has_gates = num_rows > 0 && first_head + gated <= place_of(num_rows - 1).head;
  RawGates raw_gates;
  if (has_gates) raw_gates.load(rule, n, first_head + gated);

  if (read < 0) {
    for (int i = threadIdx.x; i < num_rows; i += kThreads) {
      const Place place = place_of(i);
      if (place.row < V) store_scalar(norm.out.dtype, row_of(norm.out, n, place.head), place.row, 0.0f);
    }
    return;
  }

  // ---- loads of the state ----
  const auto state_rows = [&](int32_t slot, Place place) {
    return static_cast<State*>(rule.state.data) + slot * rule.state.stride + (place.head * V + place.row) * kDim;
  };
  const auto rows_left = [&](Place place) {  // of the group, to the end of the head
    return (V - place.row + kGroups<State, kDim> - 1) / kGroups<State, kDim>;
  };
  Place to_copy = place_of(group);
  const auto copy_pass = [&](int pass) {  // of the block
    if (pass < num_passes) {
      on_its_way.copy(pass % kStages<State, kDim>, state_rows(read, to_copy), lane, rows_left(to_copy));
      advance(to_copy);
    }
    commit_copies();
  };
#pragma unroll
  for (int pass = 0; pass < kStages<State, kDim>; ++pass) copy_pass(pass);

    // ---- convolution ----
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) raw_keys[j].history.load(conv, conv_read, 0, key_channel(j));
  if (has_gates) gates[gated] = {raw_gates.decay(rule), raw_gates.write_strength(rule)};
  for (int i = threadIdx.x; i < num_rows; i += kThreads) {
    if (!is_row(i)) {
      rows[i].x = 0.0f;
      continue;
    }
    const Place place = place_of(i);
    const int64_t channel = value_channel(place);
    if (i >= kThreads) load_row(place);
    raw_value.history.load(conv, conv_read, 0, channel);
    float window[kMaxTaps];
    rows[i].x = rounded<In>(raw_value.apply(conv, window));
    rows[i].weight = raw_weight.widened(norm.weight.dtype);
    rows[i].gate = silu(widened(raw_z));
    if (conv_write < 0) continue;
#pragma unroll
    for (int w = 1; w < kMaxTaps; ++w) {  // nobody else reads it
      if (w < conv.W) store_scalar(conv.conv_state.dtype, history_row(conv, conv_write, w - 1), channel, window[w]);
    }
  }
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) {
    const int i = j * kThreads + threadIdx.x;
    float window[kMaxTaps];
    const float y = rounded<In>(raw_keys[j].apply(conv, window));
    if (i < 2 * kDim) keys[i / kDim][i % kDim] = y;
#pragma unroll
    for (int w = 1; w < kMaxTaps; ++w) histories[j][w - 1][threadIdx.x] = window[w];
  }
  if (cluster > 1) arrive_at_cluster();
  __syncthreads();

  // ---- the delta rule ----
  Keys token;
  token.q.read(keys[0], lane);
  token.k.read(keys[1], lane);
  token.prepare(rule.normalise_qk, rule.scale);
  Place place = place_of(group);
#pragma unroll 1
  for (int pass = 0; pass < num_passes; ++pass, advance(place)) {
    const int left = rows_left(place);
    const HeadGates gate = gates[place.head - first_head];
    LaneRow<State, kDim> s[kRows];
    wait_copies<kStages<State, kDim> - 1>();
    on_its_way.widen(pass % kStages<State, kDim>, s);
    copy_pass(pass + kStages<State, kDim>);
    float& x = rows[pass * kPassRows + lane % kRows * kGroups<State, kDim> + group].x;
    const float o = token.step(s, gate.decay, gate.beta, x, lane);
    if (write >= 0) {
      State* const to = state_rows(write, place);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < left) s[r].store(to + r * kGroups<State, kDim> * kDim, lane);
      }
    }
    __syncwarp();  // x has been read by all lanes of its row
    if (Keys::template is_output<kRows>(lane)) x = lane % kRows < left ? rounded<In>(o) : 0.0f;
  }
  __syncthreads();

  // ---- the gated norm ----
  if (cluster > 1) wait_for_cluster();  // all run, and have read the history of q and k
  for (int pass = threadIdx.x / 32; pass < num_passes; pass += kThreads / 32) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < kPassRows; i += 32) {
      const float o = rows[pass * kPassRows + i].x;
      sum = fmaf(o, o, sum);
    }
    sum = sum_over_lanes<32>(sum);
#if __CUDA_ARCH__ >= 900
    const int to = threadIdx.x % 32;
    if (to < cluster) cg::this_cluster().map_shared_rank(squares, to)[first_pass + pass] = sum;
#else
    if (threadIdx.x % 32 == 0) squares[first_pass + pass] = sum;
#endif
  }
  if (cluster > 1) arrive_at_cluster();
  if (conv_write >= 0) {
#pragma unroll
    for (int j = 0; j < kKeyChannels; ++j) {
      const int i = j * kThreads + threadIdx.x;
      if (i >= 2 * kDim || i * cluster / (2 * kDim) != rank) continue;
#pragma unroll
      for (int w = 0; w < kMaxHistory; ++w) {
        if (w + 1 >= conv.W) continue;
        store_scalar(conv.conv_state.dtype, history_row(conv, conv_write, w), key_channel(j),
                     histories[j][w][threadIdx.x]);
      }
    }
  }
  if (cluster > 1) {
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  int known_head = -1;
  float factor = 0.0f;
  for (int i = threadIdx.x; i < num_rows; i += kThreads) {
    const Place place = place_of(i);
    if (place.head != known_head) {
      float sum = 0.0f;
      const int first = (place.head - key_head * ratio) * passes_of_head;
      for (int j = 0; j < passes_of_head; ++j) sum += squares[first + j];
      factor = rsqrtf(sum / static_cast<float>(V) + norm.eps);
      known_head = place.head;
    }
    if (place.row >= V) continue;
    const Row row = rows[i];
    store_scalar(norm.out.dtype, row_of(norm.out, n, place.head), place.row, row.x * factor * row.weight * row.gate);
  }
}

// Blocks of a cluster: enough to give every multiprocessor some, but no more, since each convolves q and k again.
int cluster_size(int64_t items, int passes) {
  if (!has_clusters()) return 1;
  constexpr int64_t kManyBlocks = 512;
  int size = 1;
  while (size < kMostCluster && items * size < kManyBlocks && passes >= 2 * size) size *= 2;
  return size;
}

template <class In, class State, int kDim>
void launch(const DecodeStepArgs& args, cudaStream_t stream) {
  constexpr int kPassRows = kGroups<State, kDim> * kRowsOfGroup<kDim>;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t passes_of_head = ceil_div(rule.V, kPassRows);
  const int passes = static_cast<int>(rule.HV / rule.H * passes_of_head);
  const int cluster = cluster_size(rule.N * rule.H, passes);
  const Step step = {args, static_cast<int>(passes_of_head * kPassRows), passes,
                     static_cast<int>(ceil_div(passes, cluster))};

  const dim3 grid(static_cast<unsigned>(cluster), static_cast<unsigned>(rule.H), static_cast<unsigned>(rule.N));
  const size_t bytes = Rows<State, kDim>::kBytes + sizeof(Row) * static_cast<size_t>(step.passes_of_block) * kPassRows;
  launch_overlapping(step_kernel<In, State, kDim>, grid, kThreads, bytes, cluster, stream, step);
}

}  // namespace

bool decode_step_supports(const DecodeStepArgs& args) {
  constexpr int64_t kFewestRows = 8;   // of a pass, over all layouts
  constexpr int64_t kMostRows = 8192;  // that shared memory holds
  constexpr int64_t kMostSequences = 65535;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t ratio = rule.HV / rule.H;
  return is_key_dim(rule.K) && ratio <= kMostHeads && ratio * ceil_div(rule.V, kFewestRows) <= kMostPasses &&
         ratio * (rule.V + kThreads) <= kMostRows && rule.N <= kMostSequences;
}

void gdn_decode_step(const DecodeStepArgs& args, cudaStream_t stream) {
  if (args.rule.N == 0) return;
  with_element(args.conv.x.dtype, [&](auto in) {
    with_state_element(args.rule.state.dtype, [&](auto state) {
      with_key_dim(args.rule.K, [&](auto dim) { launch<decltype(in), decltype(state), dim()>(args, stream); });
    });
  });
  check_launch("gdn_decode_step");
}

}  // namespace xgdn::kernel::cuda
