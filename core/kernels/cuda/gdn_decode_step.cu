// SPDX-License-Identifier: Apache-2.0
// A cluster of blocks takes a key head of a sequence with all of its value heads. Each block convolves q and k for
// itself and the values of its own rows; the blocks of a value head share the sum of squares of its norm.
//
// Pass: the rows that a block works on at once, one for each group of lanes. Passes never reach into another head.
// Order: all blocks of a cluster have read the history of q and k before one of them writes it.
// Rounding: as if the ops ran one after the other: q, k, v and o are rounded to the type of the activations between
// them. The sum of squares adds passes in order, so bits do not depend on the size of the cluster.
#include "core/kernels/cuda/gdn_decode_step.h"

#include <cooperative_groups.h>

#include "core/kernels/cuda/conv_taps.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 128;
constexpr int kMostCluster = 8;
constexpr int kMostPasses = 256;  // of a key head

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

__device__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cg::this_cluster().sync();
#else
  __syncthreads();
#endif
}

template <class In, class State, int kDim>
__global__ void __launch_bounds__(kThreads) step_kernel(const __grid_constant__ Step step) {
  using Layout = RowLayout<State, kDim>;
  using Keys = TokenKeys<State, kDim>;
  constexpr int kRows = kRowsOfGroup<kDim>;
  constexpr int kPassRows = kGroups<State, kDim> * kRows;
  const CausalConv1dArgs& conv = step.args.conv;
  const TokenDeltaRuleArgs& rule = step.args.rule;
  const RmsNormGatedArgs& norm = step.args.norm;

  __shared__ __align__(16) float keys[2][kDim];  // q, k
  __shared__ float squares[kMostPasses];         // of o, summed over each pass; those of this block are filled
  extern __shared__ float rows[];                // v and then o of the block's rows

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

  const int32_t read = rule.state.read[n], write = rule.state.write[n];
  const int32_t conv_read = conv.conv_state.read[n], conv_write = conv.conv_state.write[n];
  if (read < 0) {
    for (int i = threadIdx.x; i < num_rows; i += kThreads) {
      const Place place = place_of(i);
      if (place.row < V) store_scalar(norm.out.dtype, row_of(norm.out, n, place.head), place.row, 0.0f);
    }
    return;
  }

  State* const pool = static_cast<State*>(rule.state.data);
  const auto state_row = [&](int32_t slot, Place place) {
    return pool + slot * rule.state.stride + (static_cast<int64_t>(place.head) * V + place.row) * kDim;
  };
  RawLaneRow<State, State, kDim> raw_s[kRows];
  RawGates gates;
  const auto load_pass = [&](int pass) {  // of the block
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Place place = place_of(pass * kPassRows + r * kGroups<State, kDim> + group);
      raw_s[r].load_once(state_row(read, {place.head, min(place.row, V - 1)}), lane);
    }
    gates.load(rule, n, place_of(pass * kPassRows).head);
  };
  if (num_passes > 0) load_pass(0);  // while the token is convolved

  // ---- convolution ----
  const auto write_history = [&](int64_t channel, const float(&window)[kMaxTaps]) {
    if (conv_write < 0) return;
#pragma unroll
    for (int w = 1; w < kMaxTaps; ++w) {
      if (w < conv.W) store_scalar(conv.conv_state.dtype, history_row(conv, conv_write, w - 1), channel, window[w]);
    }
  };
  constexpr int kKeyChannels = (2 * kDim + kThreads - 1) / kThreads;  // of a thread
  const auto key_channel = [&](int i) {
    return static_cast<int64_t>(i / kDim * static_cast<int>(rule.H) + key_head) * kDim + i % kDim;
  };
  RawConv<In> raw_keys[kKeyChannels];
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) {
    raw_keys[j].load(conv, n, conv_read, key_channel(min(j * kThreads + static_cast<int>(threadIdx.x), 2 * kDim - 1)));
  }
  for (int i = threadIdx.x; i < num_rows; i += kThreads) {
    const Place place = place_of(i);
    if (place.row >= V) continue;
    const int64_t channel = 2 * rule.H * kDim + static_cast<int64_t>(place.head) * V + place.row;
    RawConv<In> raw;
    raw.load(conv, n, conv_read, channel);
    float window[kMaxTaps];
    rows[i] = rounded<In>(raw.apply(conv, window));
    write_history(channel, window);  // nobody else reads it
  }
  float windows[kKeyChannels][kMaxTaps];
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) {
    const int i = j * kThreads + threadIdx.x;
    const float y = rounded<In>(raw_keys[j].apply(conv, windows[j]));
    if (i < 2 * kDim) keys[i / kDim][i % kDim] = y;
  }
  __syncthreads();

  // ---- the delta rule ----
  Keys token;
  token.q.read(keys[0], lane);
  token.k.read(keys[1], lane);
  token.prepare(rule.normalise_qk, rule.scale);
  for (int pass = 0; pass < num_passes; ++pass) {
    LaneRow<State, kDim> s[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) raw_s[r].widen(s[r]);
    const Decay decay = gates.decay(rule);
    const float beta = gates.write_strength(rule);
    if (pass + 1 < num_passes) load_pass(pass + 1);
    const int first = pass * kPassRows + group;
    const int output = first + Keys::template output_row<kRows>(lane) * kGroups<State, kDim>;
    const float o = token.step(s, decay, beta, rows[output], lane);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Place place = place_of(first + r * kGroups<State, kDim>);
      if (write >= 0 && place.row < V) s[r].store(state_row(write, place), lane);
    }
    __syncwarp();
    if (Keys::template is_output<kRows>(lane)) rows[output] = place_of(output).row < V ? rounded<In>(o) : 0.0f;
  }
  __syncthreads();

  // ---- the gated norm ----
  for (int pass = threadIdx.x / 32; pass < num_passes; pass += kThreads / 32) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < kPassRows; i += 32) {
      const float o = rows[pass * kPassRows + i];
      sum = fmaf(o, o, sum);
    }
    sum = sum_over_lanes<32>(sum);
    if (threadIdx.x % 32 == 0) squares[first_pass + pass] = sum;
  }
  sync_cluster();
  const auto squares_of = [&](int pass) {
#if __CUDA_ARCH__ >= 900
    return cg::this_cluster().map_shared_rank(squares, pass / step.passes_of_block)[pass];
#else
    return squares[pass];
#endif
  };
  int known_head = -1;
  float factor = 0.0f;
  for (int i = threadIdx.x; i < num_rows; i += kThreads) {
    const Place place = place_of(i);
    if (place.head != known_head) {
      float sum = 0.0f;
      const int first = (place.head - key_head * ratio) * passes_of_head;
      for (int j = 0; j < passes_of_head; ++j) sum += squares_of(first + j);
      factor = rsqrtf(sum / static_cast<float>(V) + norm.eps);
      known_head = place.head;
    }
    if (place.row >= V) continue;
    const float z = widened(row_of<In>(norm.z, n, place.head)[place.row]);
    const float weight = load_scalar(norm.weight.dtype, norm.weight.data, place.row);
    store_scalar(norm.out.dtype, row_of(norm.out, n, place.head), place.row, rows[i] * factor * weight * silu(z));
  }
#pragma unroll
  for (int j = 0; j < kKeyChannels; ++j) {
    const int i = j * kThreads + threadIdx.x;
    if (i < 2 * kDim && i * cluster / (2 * kDim) == rank) write_history(key_channel(i), windows[j]);
  }
  if (cluster > 1) sync_cluster();  // others may still read this block's squares
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

  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(rule.H), static_cast<unsigned>(rule.N));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(float) * static_cast<size_t>(step.passes_of_block) * kPassRows;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, step_kernel<In, State, kDim>, step);
}

}  // namespace

bool decode_step_supports(const DecodeStepArgs& args) {
  constexpr int64_t kFewestRows = 8;   // of a pass, over all layouts
  constexpr int64_t kMostRows = 8192;  // that shared memory holds
  constexpr int64_t kMostSequences = 65535;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t ratio = rule.HV / rule.H;
  return is_key_dim(rule.K) && ratio * ceil_div(rule.V, kFewestRows) <= kMostPasses &&
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
