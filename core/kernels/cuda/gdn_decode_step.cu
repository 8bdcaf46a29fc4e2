// SPDX-License-Identifier: Apache-2.0
// A cluster of blocks takes a key head of a sequence with all of its value heads. Each block convolves q and k for
// itself and the values of its own rows; the blocks of a value head share the sum of squares of its norm.
//
// Pass: the rows that a block works on at once, kRows for each group of lanes. Passes never reach into another head;
// those behind the current one are on their way to shared memory.
// Order: all blocks of a cluster have read the history of q and k before one of them writes it: a block sends its sums
// of squares after it has read, and writes when it has those of all.
// Time: for few sequences it is one way to memory and back, and the arithmetic in between. So state, history and
// weights are brought to the second-level cache ahead of the wait for the kernel before, and all that is read after it
// is asked for at once: the slots were read ahead too, which their tensors, that no kernel of ours writes, usually
// allow. They are read again, and where another kernel had not yet written them, everything of the slots is. Rounding:
// as if the ops ran one after the other: q, k, v and o are rounded to the type of the activations between them. The sum
// of squares adds passes in order, so bits do not depend on the size of the cluster.
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
constexpr int32_t kNoSlot = -1;

struct Step {
  DecodeStepArgs args;
  int64_t num_slots, num_conv_slots;
  int ratio;            // value heads of a key head
  int rows_of_head;     // V, or more: a whole number of passes
  int passes;           // of a key head
  int passes_of_block;  // of a block of the cluster, at most and at least one
};

// Those that a sequence reads.
struct Slots {
  int32_t state, conv;

  __device__ void load(const DecodeStepArgs& args, int64_t n) {
    state = __ldcg(args.rule.state.read + n);
    conv = __ldcg(args.conv.conv_state.read + n);
  }
  __device__ bool operator==(const Slots& other) const { return state == other.state && conv == other.conv; }
};

template <class State, int kDim>
constexpr int kGroups = kThreads / RowLayout<State, kDim>::kLanes;

template <class Element>
constexpr DType dtype_of = std::is_same_v<Element, float>           ? DType::kFloat32
                           : std::is_same_v<Element, __nv_bfloat16> ? DType::kBFloat16
                                                                    : DType::kFloat16;

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
  CausalConv1dArgs conv = step.args.conv;
  const TokenDeltaRuleArgs& rule = step.args.rule;
  RmsNormGatedArgs norm = step.args.norm;
  conv.conv_state.dtype = norm.out.dtype = dtype_of<In>;  // known when compiling

  __shared__ __align__(16) float keys[2][kDim];                     // q, k
  __shared__ float squares[kMostPasses];                            // of o, summed over each pass
  __shared__ HeadGates gates[kMostHeads];                           // of the value heads of the block
  __shared__ float histories[kKeyChannels][kMaxHistory][kThreads];  // of q and k as they will be
  __shared__ __align__(8) uint64_t squares_barrier;                 // of squares, from all blocks of the cluster
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
  const int ratio = step.ratio;
  const int V = static_cast<int>(rule.V);
  const int passes_of_head = step.rows_of_head / kPassRows;
  const int first_pass = rank * step.passes_of_block;
  const int num_passes = min(step.passes_of_block, step.passes - first_pass);
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
  const Place own_place = place_of(threadIdx.x);
  const bool has_row = static_cast<int>(threadIdx.x) < num_rows && own_place.row < V;
  const int gated = kThreads - 1 - static_cast<int>(threadIdx.x);  // the head whose gates this thread prepares
  const bool has_gates = first_head + gated <= place_of(num_rows - 1).head;
  const auto key_channel = [&](int j) {
    const int i = min(j * kThreads + static_cast<int>(threadIdx.x), 2 * kDim - 1);
    return static_cast<int64_t>(i / kDim * static_cast<int>(rule.H) + key_head) * kDim + i % kDim;
  };
  const auto value_channel = [&](Place place) {
    return 2 * rule.H * kDim + static_cast<int64_t>(place.head) * V + place.row;
  };
  const auto state_rows = [&](int32_t slot, Place place) {
    return static_cast<State*>(rule.state.data) + slot * rule.state.stride + (place.head * V + place.row) * kDim;
  };

  // ---- ahead of the kernel before ----
  let_next_kernel_launch();
  const uint32_t barrier = shared_address(&squares_barrier);
  if (cluster > 1 && threadIdx.x == 0) {
    init_barrier(barrier, 1);
    fence_barrier_init();
  }
  Slots slots;
  slots.load(step.args, n);
  if (slots.state < 0 || slots.state >= step.num_slots || slots.conv < 0 || slots.conv >= step.num_conv_slots) {
    slots = {kNoSlot, kNoSlot};
  }
  const auto prefetch_channel = [&](int64_t channel) {
    prefetch_line(static_cast<const In*>(conv.weight) + channel * conv.W);
    if (slots.conv == kNoSlot) return;
    for (int w = 0; w + 1 < conv.W; ++w) prefetch_line(history_row(conv, slots.conv, w) + channel * sizeof(In));
  };
  if (cluster > 1) {  // with many blocks memory is busy anyway
#pragma unroll
    for (int j = 0; j < kKeyChannels; ++j) prefetch_channel(key_channel(j));
    if (has_row) {
      prefetch_channel(value_channel(own_place));
      prefetch_line(static_cast<const char*>(norm.weight.data) +
                    own_place.row * (norm.weight.dtype == DType::kFloat32 ? 4 : 2));
    }
    if (slots.state != kNoSlot && threadIdx.x < min(num_passes, kStages<State, kDim>)) {
      const Place place = place_of(threadIdx.x * kPassRows);
      const int count = min(kPassRows, V - place.row);
      prefetch_row(state_rows(slots.state, place), static_cast<uint32_t>(count * kDim * sizeof(State)));
    }
  }
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) cg::this_cluster().sync();  // the barriers are there
#endif
  if (cluster > 1 && threadIdx.x == 0) arrive_and_expect(barrier, static_cast<uint32_t>(step.passes) * sizeof(float));
  wait_for_kernel_before();

  // ---- what a thread reads ----
  Slots known;
  known.load(step.args, n);
  const int32_t write = rule.state.write[n], conv_write = conv.conv_state.write[n];
  RawConv<In> raw_keys[kKeyChannels];
  RawConv<In> raw_value;
  In raw_z;
  RawScalar raw_weight;
  const auto rows_left = [&](Place place) {  // of the group, to the end of the head
    return (V - place.row + kGroups<State, kDim> - 1) / kGroups<State, kDim>;
  };
  Place to_copy;
  const auto copy_pass = [&](int pass) {  // of the block
    if (pass < num_passes && slots.state >= 0) {
      on_its_way.copy(pass % kStages<State, kDim>, state_rows(slots.state, to_copy), lane, rows_left(to_copy));
      advance(to_copy);
    }
    commit_copies();
  };
  const auto load_row = [&](Place place) {
    raw_value.load_inputs(conv, n, value_channel(place));
    raw_z = row_of<In>(norm.z, n, place.head)[place.row];
    raw_weight.load(norm.weight.dtype, norm.weight.data, place.row);
  };
  RawGates raw_gates;  // first what the longest chain of steps begins with
  if (has_gates) raw_gates.load(rule, n, first_head + gated);
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) raw_keys[j].load_inputs(conv, n, key_channel(j));
  if (has_row) load_row(own_place);
#pragma unroll 1
  while (true) {
    if (slots.state >= 0) {
#pragma unroll
      for (int j = 0; j < kKeyChannels; ++j) raw_keys[j].history.load(conv, slots.conv, 0, key_channel(j));
      if (has_row) raw_value.history.load(conv, slots.conv, 0, value_channel(own_place));
    }
    to_copy = place_of(group);
#pragma unroll
    for (int pass = 0; pass < kStages<State, kDim>; ++pass) copy_pass(pass);
    if (slots == known) break;
    wait_copies<0>();
    slots = known;
  }
  if (slots.state < 0) {
    for (int i = threadIdx.x; i < num_rows; i += kThreads) {
      const Place place = place_of(i);
      if (place.row < V) store_scalar(norm.out.dtype, row_of(norm.out, n, place.head), place.row, 0.0f);
    }
    return;
  }

  // ---- convolution ----
  if (has_gates) gates[gated] = {raw_gates.decay(rule), raw_gates.write_strength(rule)};
  for (int i = threadIdx.x; i < num_rows; i += kThreads) {
    const Place place = i < kThreads ? own_place : place_of(i);
    if (place.row >= V) {
      rows[i].x = 0.0f;
      continue;
    }
    const int64_t channel = value_channel(place);
    if (i >= kThreads) {
      load_row(place);
      raw_value.history.load(conv, slots.conv, 0, channel);
    }
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
  for (int pass = threadIdx.x / 32; pass < num_passes; pass += kThreads / 32) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < kPassRows; i += 32) {
      const float o = rows[pass * kPassRows + i].x;
      sum = fmaf(o, o, sum);
    }
    sum = sum_over_lanes<32>(sum);
    const int to = threadIdx.x % 32;
    float* const square = squares + first_pass + pass;
    if (cluster == 1) {
      if (to == 0) *square = sum;
    } else if (to < cluster) {
      store_async(to, shared_address(square), barrier, sum);
    }
  }
  if (cluster > 1) {
    wait_at_for_cluster(barrier, 0);
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

  // ---- the history of q and k ----
  if (conv_write < 0) return;
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

// Blocks of a cluster: enough to give every multiprocessor some, but no more, since each convolves q and k again. Each
// has a pass.
int cluster_size(int64_t items, int passes) {
  if (!has_clusters()) return 1;
  constexpr int64_t kManyBlocks = 512;
  int size = 1;
  while (size < kMostCluster && items * size < kManyBlocks && passes >= 2 * size) size *= 2;
  while ((size - 1) * ceil_div(passes, size) >= passes) size /= 2;
  return size;
}

template <class In, class State, int kDim>
void launch(const DecodeStepArgs& args, int64_t num_slots, int64_t num_conv_slots, cudaStream_t stream) {
  constexpr int kPassRows = kGroups<State, kDim> * kRowsOfGroup<kDim>;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t passes_of_head = ceil_div(rule.V, kPassRows);
  const int passes = static_cast<int>(rule.HV / rule.H * passes_of_head);
  const int cluster = cluster_size(rule.N * rule.H, passes);
  const Step step = {args,
                     num_slots,
                     num_conv_slots,
                     static_cast<int>(rule.HV / rule.H),
                     static_cast<int>(passes_of_head * kPassRows),
                     passes,
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
  return args.conv.conv_state.dtype == args.conv.x.dtype && is_key_dim(rule.K) && ratio <= kMostHeads &&
         ratio * ceil_div(rule.V, kFewestRows) <= kMostPasses && ratio * (rule.V + kThreads) <= kMostRows &&
         rule.N <= kMostSequences;
}

void gdn_decode_step(const DecodeStepArgs& args, int64_t num_slots, int64_t num_conv_slots, cudaStream_t stream) {
  if (args.rule.N == 0) return;
  with_element(args.conv.x.dtype, [&](auto in) {
    with_state_element(args.rule.state.dtype, [&](auto state) {
      with_key_dim(args.rule.K, [&](auto dim) {
        launch<decltype(in), decltype(state), dim()>(args, num_slots, num_conv_slots, stream);
      });
    });
  });
  check_launch("gdn_decode_step");
}

}  // namespace xgdn::kernel::cuda
