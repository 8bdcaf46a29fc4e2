// SPDX-License-Identifier: Apache-2.0
// A cluster of blocks takes a key head of a sequence with all of its value heads. Each block convolves q and k for
// itself and the values of its own rows; the blocks of a value head share the sum of squares of its norm.
//
// Quad: four neighbouring channels, or rows of a value head, of which a thread loads, convolves and norms all at once.
// Pass: the rows that a block works on at once, kRows for each group of lanes. Passes never reach into another head;
// those behind the current one are on their way to shared memory.
// Order: all blocks of a cluster have read the history of q and k before one of them writes it: a block sends its sums
// of squares after it has read, and writes when it has those of all.
// Time: for few sequences it is one way to memory and back, and the instructions in between, which a warp issues once.
// So a call of the usual shape (kIsPlain) has code of its own without a choice in it; what the block reads first is
// brought to the second-level cache ahead of the wait for the kernel before, and all that is read after it is asked for
// at once: the slots were read ahead too, which their tensors, that no kernel of ours writes, usually allow. They are
// read again, and where another kernel had not yet written them, everything of the slots is.
// Rounding: as if the ops ran one after the other: q, k, v and o are rounded to the type of the activations between
// them. The sum of squares is one over each unit, which is as many neighbouring rows as a warp has groups, and then
// over the units of the head, in four chains. So bits depend on neither the size of the cluster nor the plan.
#include "core/kernels/cuda/gdn_decode_step.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "core/kernels/cuda/conv_taps.cuh"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/divisor.cuh"
#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/state_rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kQuad = 4;
constexpr int kChains = 4;  // of the sum of squares of a head
constexpr int kMostCluster = 8;
constexpr int kMostHeads = kThreads;  // of a key head
constexpr int32_t kNoSlot = -1;
constexpr int kBytesAhead = 32 << 10;  // of the state, of a block

struct Step {
  DecodeStepArgs args;
  int64_t num_slots, num_conv_slots;
  int ratio;             // value heads of a key head
  Divisor rows_of_head;  // V, or more: a whole number of passes
  int passes_of_head;
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

// How many rows a group of lanes takes in a pass, how many passes are on their way, how many blocks of a multiprocessor
// there are registers for, and whether rows are copied in bulk.
template <int kRows_, int kStages_, int kResident_, bool kIsBulk_>
struct Plan {
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kStages_;
  static constexpr int kResident = kResident_;
  static constexpr bool kIsBulk = kIsBulk_;
};

template <class State, int kDim, class Plan>
using Rows = WarpRows<State, kDim, Plan::kRows, Plan::kStages, kWarps, Plan::kIsBulk>;

template <class State, int kDim, class Plan>
constexpr int kPassRows = Rows<State, kDim, Plan>::kCount* kWarps;

struct HeadGates {
  Decay decay;
  float beta;
};

// Four neighbours as they lie in memory. kIsPlain: all four are there, in one packet; else the first `count`.
template <class Element, bool kIsPlain>
struct RawQuad {
  using Packet = std::conditional_t<sizeof(Element) == 4, uint4, uint2>;
  alignas(Packet) Element x[kQuad];

  __device__ void load(const Element* from, int count) {
    if constexpr (kIsPlain) {
      *reinterpret_cast<Packet*>(x) = *reinterpret_cast<const Packet*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) x[i] = i < count ? from[i] : narrowed<Element>(0.0f);
    }
  }
  __device__ void store(Element* to, int count) const {
    if constexpr (kIsPlain) {
      *reinterpret_cast<Packet*>(to) = *reinterpret_cast<const Packet*>(x);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (i < count) to[i] = x[i];
      }
    }
  }
  __device__ float4 widened() const {
    return {cuda::widened(x[0]), cuda::widened(x[1]), cuda::widened(x[2]), cuda::widened(x[3])};
  }
};

// The convolution of a quad of channels on its way: inputs, taps and history.
template <class In, bool kIsPlain>
struct RawConvQuad {
  using Quad = RawQuad<In, kIsPlain>;
  Quad history[kMaxHistory];
  Quad input;
  alignas(16) Quad taps[kQuad];  // of each channel
  Quad bias;

  __device__ void load_inputs(const CausalConv1dArgs& a, int64_t n, int channel, int count) {
    input.load(row_of<In>(a.x, n, 0) + channel, count);
    const auto* const weight = static_cast<const In*>(a.weight);
    if constexpr (kIsPlain) {
      const auto* const from = reinterpret_cast<const uint4*>(weight + channel * kMaxTaps);
#pragma unroll
      for (int i = 0; i < kQuad * kMaxTaps * static_cast<int>(sizeof(In)) / 16; ++i) {
        reinterpret_cast<uint4*>(taps)[i] = from[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        taps[i].load(weight + (channel + min(i, count - 1)) * a.W, static_cast<int>(a.W));
      }
    }
    if (a.bias != nullptr) bias.load(static_cast<const In*>(a.bias) + channel, count);
  }
  __device__ void load_history(const CausalConv1dArgs& a, int32_t slot, int channel, int count) {
#pragma unroll
    for (int w = 0; w < kMaxHistory; ++w) {
      if (kIsPlain || w + 1 < a.W) history[w].load(history_of(a, slot, w) + channel, count);
    }
  }
  __device__ static In* history_of(const CausalConv1dArgs& a, int32_t slot, int row) {
    return static_cast<In*>(a.conv_state.data) + slot * a.conv_state.stride + row * a.D;
  }

  // v, or q or k, of the four: rounded.
  __device__ float4 apply(const CausalConv1dArgs& a) const {
    float y[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      float window[kMaxTaps] = {};
#pragma unroll
      for (int w = 0; w < kMaxHistory; ++w) {
        if (kIsPlain || w + 1 < a.W) window[w] = cuda::widened(history[w].x[i]);
      }
      set_newest(kIsPlain ? kMaxTaps : a.W, cuda::widened(input.x[i]), window);
      ConvChannel channel;
#pragma unroll
      for (int w = 0; w < kMaxTaps; ++w) channel.taps[w] = cuda::widened(taps[i].x[w]);
      channel.bias = a.bias == nullptr ? 0.0f : cuda::widened(bias.x[i]);
      y[i] = rounded<In>(channel.apply(window, /*has_silu=*/true));
    }
    return {y[0], y[1], y[2], y[3]};
  }
  // Row w of the next token's history: the row behind it, or the input.
  __device__ const Quad& next_history(const CausalConv1dArgs& a, int w) const {
    const bool is_newest = kIsPlain ? w + 2 == kMaxTaps : w + 2 == a.W;
    return is_newest ? input : history[(w + 1) % kMaxHistory];
  }
};

// What a thread brings of the norm for a quad of rows: f32 weight and the gate.
template <class In, bool kIsPlain>
struct RawNormQuad {
  RawQuad<In, kIsPlain> z;
  RawQuad<float, kIsPlain> weight;

  __device__ void load(const RmsNormGatedArgs& a, int64_t n, int head, int row, int count) {
    z.load(row_of<In>(a.z, n, head) + row, count);
    if (a.weight.dtype == DType::kFloat32) {
      weight.load(static_cast<const float*>(a.weight.data) + row, count);
    } else {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) weight.x[i] = i < count ? load_scalar(a.weight.dtype, a.weight.data, row + i) : 0;
    }
  }
};

__device__ float4 silu(float4 x) {
  return {cuda::silu(x.x), cuda::silu(x.y), cuda::silu(x.z), cuda::silu(x.w)};
}

template <class In, class State, int kDim, class Plan, bool kIsPlain>
__global__ void __launch_bounds__(kThreads, Plan::kResident) step_kernel(const __grid_constant__ Step step) {
  using Layout = RowLayout<State, kDim>;
  using Keys = TokenKeys<State, kDim>;
  using Conv = RawConvQuad<In, kIsPlain>;
  using Rows = cuda::Rows<State, kDim, Plan>;
  constexpr int kRows = Plan::kRows;
  constexpr int kStages = Plan::kStages;
  constexpr int kPassRows = cuda::kPassRows<State, kDim, Plan>;
  constexpr int kGroups = Rows::kGroups;
  constexpr int kKeyQuads = 2 * kDim / kQuad;  // of q and k
  // Passes that are brought to the second-level cache: with more, those of all blocks push each other out.
  constexpr int kAhead = std::max(1, std::min(kStages, kBytesAhead / Rows::kStageBytes));
  static_assert(kKeyQuads <= kThreads && kPassRows % kQuad == 0 && kPassRows / kGroups % kChains == 0);
  const CausalConv1dArgs& conv = step.args.conv;
  const TokenDeltaRuleArgs& rule = step.args.rule;
  const RmsNormGatedArgs& norm = step.args.norm;

  __shared__ __align__(16) float keys[2 * kDim];                          // q, k
  __shared__ HeadGates gates[kMostHeads];                                 // of the value heads of the block
  __shared__ RawQuad<In, kIsPlain> next_history[kKeyQuads][kMaxHistory];  // of q and k
  __shared__ __align__(8) uint64_t squares_barrier;                       // of squares, from the whole cluster
  __shared__ __align__(8) typename Rows::Barriers barriers;
  extern __shared__ uint4 shared[];

#if __CUDA_ARCH__ >= 900
  const int cluster = static_cast<int>(cg::this_cluster().num_blocks());
  const int rank = static_cast<int>(cg::this_cluster().block_rank());
#else
  constexpr int cluster = 1, rank = 0;
#endif
  const int key_head = blockIdx.y;
  const int64_t n = blockIdx.z;
  const int V = static_cast<int>(rule.V);
  const int first_pass = rank * step.passes_of_block;
  const int num_passes = min(step.passes_of_block, step.passes - first_pass);
  const int num_rows = num_passes * kPassRows;
  const int num_quads = kKeyQuads + num_rows / kQuad;
  const int lane = threadIdx.x % Layout::kLanes;
  const int warp = threadIdx.x / 32;
  // Of each row of the block, between the convolution and the norm.
  const int stages = min(step.passes_of_block, kStages);
  float* const x_of_rows = reinterpret_cast<float*>(shared) + stages * (Rows::kStageBytes / 4);  // v, then o
  float* const weight_of_rows = x_of_rows + step.passes_of_block * kPassRows;
  float* const gate_of_rows = weight_of_rows + step.passes_of_block * kPassRows;
  float* const squares = gate_of_rows + step.passes_of_block * kPassRows;  // of o, by units of the key head

  // Row i of the block, as a row of a value head.
  struct Place {
    int head, row;
  };
  const int first_head = step.rows_of_head.quotient(first_pass * kPassRows);  // of the key head
  const auto place_of = [&](int i) {
    const int in_key_head = first_pass * kPassRows + i;
    const int head = step.rows_of_head.quotient(in_key_head);
    return Place{key_head * step.ratio + head, in_key_head - head * static_cast<int>(step.rows_of_head.value)};
  };
  const auto advance = [&](Place& place) {  // by a pass
    const int end = static_cast<int>(step.rows_of_head.value);
    place.row += kPassRows;
    if (place.row >= end) place = {place.head + 1, place.row - end};
  };
  // Quad i of the block: first those of q and k.
  struct QuadPlace {
    int channel;
    int count;    // of its channels that there are
    Place place;  // of a quad of values
  };
  const auto quad_place_of = [&](int i) {
    if (i < kKeyQuads) {
      constexpr int kHalf = kKeyQuads / 2;
      const int head = i < kHalf ? key_head : static_cast<int>(rule.H) + key_head;
      return QuadPlace{head * kDim + i % kHalf * kQuad, kQuad, {}};
    }
    const Place place = place_of((i - kKeyQuads) * kQuad);
    return QuadPlace{static_cast<int>(2 * rule.H) * kDim + place.head * V + place.row, min(kQuad, V - place.row),
                     place};
  };
  const auto state_rows = [&](int32_t slot, Place place) {
    return static_cast<State*>(rule.state.data) + slot * rule.state.stride + (place.head * V + place.row) * kDim;
  };
  const int gated = kThreads - 1 - static_cast<int>(threadIdx.x);  // the head whose gates this thread prepares
  const bool has_gates = first_head + gated <= step.rows_of_head.quotient(first_pass * kPassRows + num_rows - 1);
  const QuadPlace own = quad_place_of(threadIdx.x);
  const bool has_quad = static_cast<int>(threadIdx.x) < num_quads && own.count > 0;

  // ---- ahead of the kernel before ----
  let_next_kernel_launch();
  const uint32_t barrier = shared_address(&squares_barrier);
  if (cluster > 1 && threadIdx.x == 0) {
    init_barrier(barrier, 1);
    fence_barrier_init();
  }
  const Rows on_its_way(shared, barriers);
  Slots slots;
  slots.load(step.args, n);
  if (slots.state < 0 || slots.state >= step.num_slots || slots.conv < 0 || slots.conv >= step.num_conv_slots) {
    slots = {kNoSlot, kNoSlot};
  }
  if (has_quad) {
    prefetch_line(row_of<In>(conv.x, n, 0) + own.channel);
    prefetch_line(static_cast<const In*>(conv.weight) + own.channel * conv.W);
    for (int w = 0; slots.conv != kNoSlot && w + 1 < conv.W; ++w) {
      prefetch_line(Conv::history_of(conv, slots.conv, w) + own.channel);
    }
    if (static_cast<int>(threadIdx.x) >= kKeyQuads) {
      prefetch_line(row_of<In>(norm.z, n, own.place.head) + own.place.row);
      prefetch_line(static_cast<const char*>(norm.weight.data) +
                    own.place.row * (norm.weight.dtype == DType::kFloat32 ? 4 : 2));
    }
  }
  if (has_gates) {
    prefetch_line(row_of(rule.g, n, key_head * step.ratio + first_head + gated));
    prefetch_line(row_of(rule.beta, n, key_head * step.ratio + first_head + gated));
  }
  if (slots.state != kNoSlot && static_cast<int>(threadIdx.x) < min(num_passes, kAhead)) {
    const Place place = place_of(threadIdx.x * kPassRows);
    const int count = min(kPassRows, V - place.row);
    prefetch_row(state_rows(slots.state, place), static_cast<uint32_t>(count * kDim * sizeof(State)));
  }
#if __CUDA_ARCH__ >= 900
  if (cluster > 1) cg::this_cluster().sync();  // the barriers are there
#endif
  if (cluster > 1 && threadIdx.x == 0) {
    arrive_and_expect(barrier,
                      static_cast<uint32_t>(step.passes * (kPassRows / kGroups) * static_cast<int>(sizeof(float))));
  }
  wait_for_kernel_before();

  // ---- what a thread reads ----
  Slots known;
  known.load(step.args, n);
  const int32_t write = rule.state.write[n], conv_write = conv.conv_state.write[n];
  int first_turn = 0;  // of a stage
  Conv raw;
  RawNormQuad<In, kIsPlain> raw_norm;
  RawGates raw_gates;
  const Place first_place = place_of(warp * Rows::kCount);  // of the warp
  Place to_copy = first_place;
  const auto copy_pass = [&](int pass) {  // of the block
    if (pass >= num_passes || slots.state < 0) return on_its_way.copy_nothing();
    on_its_way.copy(pass % kStages, state_rows(slots.state, to_copy), V - to_copy.row);
    advance(to_copy);
  };
  if (has_gates) raw_gates.load(rule, n, key_head * step.ratio + first_head + gated);  // the longest chain of steps
  if (has_quad) {
    raw.load_inputs(conv, n, own.channel, own.count);
    if (static_cast<int>(threadIdx.x) >= kKeyQuads) raw_norm.load(norm, n, own.place.head, own.place.row, own.count);
  }
#pragma unroll 1
  while (true) {
    if (slots.state >= 0 && has_quad) raw.load_history(conv, slots.conv, own.channel, own.count);
    to_copy = first_place;
#pragma unroll 1
    for (int pass = 0; pass < kStages; ++pass) copy_pass(pass);
    if (slots == known) break;
    if (slots.state >= 0) {  // what is under way could come behind what is asked for next
#pragma unroll 1
      for (int pass = 0; pass < min(num_passes, kStages); ++pass) on_its_way.wait(pass, 0);
      wait_copies<0>();
      __syncwarp();
      first_turn = 1;
    }
    slots = known;
  }
  if (slots.state < 0) {
    for (int i = threadIdx.x; i < num_rows; i += kThreads) {
      const Place place = place_of(i);
      if (place.row < V) row_of<In>(norm.out, n, place.head)[place.row] = narrowed<In>(0.0f);
    }
    return;
  }

  // ---- convolution ----
  if (has_gates) gates[gated] = {raw_gates.decay(rule), raw_gates.write_strength(rule)};
#pragma unroll 1
  for (int i = threadIdx.x; i < num_quads; i += kThreads) {
    QuadPlace quad = own;
    const bool is_of_keys = i < kKeyQuads;
    if (i >= kThreads) {
      quad = quad_place_of(i);
      if (quad.count > 0) {
        raw.load_inputs(conv, n, quad.channel, quad.count);
        raw.load_history(conv, slots.conv, quad.channel, quad.count);
        raw_norm.load(norm, n, quad.place.head, quad.place.row, quad.count);
      }
    }
    const int row = (i - kKeyQuads) * kQuad;
    if (quad.count <= 0) {
      *reinterpret_cast<float4*>(x_of_rows + row) = {};
      continue;
    }
    const float4 y = raw.apply(conv);
    *reinterpret_cast<float4*>(is_of_keys ? keys + i * kQuad : x_of_rows + row) = y;
    if (!is_of_keys) {
      *reinterpret_cast<float4*>(weight_of_rows + row) = raw_norm.weight.widened();
      *reinterpret_cast<float4*>(gate_of_rows + row) = silu(raw_norm.z.widened());
    }
    if (conv_write < 0) continue;
    if (is_of_keys && cluster > 1) {  // other blocks may not have read it yet
#pragma unroll
      for (int w = 0; w < kMaxHistory; ++w) next_history[i][w] = raw.next_history(conv, w);
    } else {
#pragma unroll
      for (int w = 0; w < kMaxHistory; ++w) {
        if (kIsPlain || w + 1 < conv.W) {
          raw.next_history(conv, w).store(Conv::history_of(conv, conv_write, w) + quad.channel, quad.count);
        }
      }
    }
  }
  __syncthreads();

  // ---- the delta rule ----
  Keys token;
  token.q.read(keys, lane);
  token.k.read(keys + kDim, lane);
  token.prepare(rule.normalise_qk, rule.scale);
  Place place = first_place;
#pragma unroll 1
  for (int pass = 0; pass < num_passes; ++pass, advance(place)) {
    const int group = threadIdx.x % 32 / Layout::kLanes;
    const int left = (V - place.row - group + kGroups - 1) / kGroups;  // rows of the group, to the end of the head
    const HeadGates gate = gates[place.head - key_head * step.ratio - first_head];
    LaneRow<State, kDim> s[kRows];
    on_its_way.wait(pass % kStages, first_turn + pass / kStages);
    on_its_way.widen(pass % kStages, s);
    float& x = x_of_rows[pass * kPassRows + warp * Rows::kCount + lane % kRows * kGroups + group];
    const float v = x;
    float o = token.step(s, gate.decay, gate.beta, v, lane);
    // A barrier of the warp waits for no read that is under way, and a bulk copy could overtake one. The step's sums
    // take what all lanes read, so behind it no read is.
    __syncwarp();
    copy_pass(pass + kStages);
    if (write >= 0) {
      State* const to = state_rows(write, place) + group * kDim;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < left) s[r].store(to + r * kGroups * kDim, lane);
      }
    }
    o = lane % kRows < left ? rounded<In>(o) : 0.0f;
    float square = o * o;
#pragma unroll
    for (int lanes = Layout::kLanes; lanes < 32; lanes *= 2) square += __shfl_xor_sync(0xffffffffu, square, lanes);
    if (!Keys::template is_output<kRows>(lane)) continue;
    x = o;
    float* const to = squares + ((first_pass + pass) * kPassRows + warp * Rows::kCount) / kGroups + lane % kRows;
    if (cluster == 1) {
      if (group == 0) *to = square;
    } else {
      for (int other = group; other < cluster; other += kGroups) {
        store_async(other, shared_address(to), barrier, square);
      }
    }
  }

  // ---- the gated norm ----
  __syncthreads();
  if (cluster > 1) wait_at_for_cluster(barrier, 0);
#pragma unroll 1
  for (int i = threadIdx.x * kQuad; i < num_rows; i += kThreads * kQuad) {
    const Place place = place_of(i);
    if (place.row >= V) continue;
    const int units = step.passes_of_head * (kPassRows / kGroups);
    const float* const of_units = squares + (place.head - key_head * step.ratio) * units;
    float sums[kChains] = {};
#pragma unroll 8
    for (int unit = 0; unit < units; unit += kChains) {
      const float4 four = *reinterpret_cast<const float4*>(of_units + unit);
      sums[0] += four.x, sums[1] += four.y, sums[2] += four.z, sums[3] += four.w;
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const float factor = rsqrtf(sum / static_cast<float>(V) + norm.eps);
    const float4 x = *reinterpret_cast<const float4*>(x_of_rows + i);
    const float4 weight = *reinterpret_cast<const float4*>(weight_of_rows + i);
    const float4 gate = *reinterpret_cast<const float4*>(gate_of_rows + i);
    RawQuad<In, kIsPlain> out;
    out.x[0] = narrowed<In>(x.x * factor * weight.x * gate.x);
    out.x[1] = narrowed<In>(x.y * factor * weight.y * gate.y);
    out.x[2] = narrowed<In>(x.z * factor * weight.z * gate.z);
    out.x[3] = narrowed<In>(x.w * factor * weight.w * gate.w);
    out.store(row_of<In>(norm.out, n, place.head) + place.row, V - place.row);
  }

  // ---- the history of q and k ----
  const int quad = threadIdx.x;
  if (cluster > 1 && conv_write >= 0 && quad < kKeyQuads && quad * cluster / kKeyQuads == rank) {
#pragma unroll
    for (int w = 0; w < kMaxHistory; ++w) {
      if (kIsPlain || w + 1 < conv.W) {
        next_history[quad][w].store(Conv::history_of(conv, conv_write, w) + own.channel, kQuad);
      }
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

// Whether channels and rows can be read four at a time.
template <class In>
bool is_plain(const DecodeStepArgs& a) {
  const auto is_quad = [](const void* data, std::initializer_list<int64_t> strides) {
    return reinterpret_cast<uintptr_t>(data) % (kQuad * sizeof(In)) == 0 &&
           std::all_of(strides.begin(), strides.end(), [](int64_t stride) { return stride % kQuad == 0; });
  };
  return a.conv.W == kMaxTaps && a.rule.V % kQuad == 0 && reinterpret_cast<uintptr_t>(a.conv.weight) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(a.norm.weight.data) % 16 == 0 && is_quad(a.conv.bias, {}) &&
         is_quad(a.conv.x.data, {a.conv.x.token_stride}) &&
         is_quad(a.conv.conv_state.data, {a.conv.conv_state.stride, a.conv.D}) &&
         is_quad(a.norm.z.data, {a.norm.z.token_stride, a.norm.z.head_stride}) &&
         is_quad(a.norm.out.data, {a.norm.out.token_stride, a.norm.out.head_stride});
}

template <class In, class State, int kDim, class Plan, bool kIsPlain>
void launch_plan(const DecodeStepArgs& args, int64_t num_slots, int64_t num_conv_slots, int cluster,
                 cudaStream_t stream) {
  using Rows = cuda::Rows<State, kDim, Plan>;
  constexpr int kPassRows = cuda::kPassRows<State, kDim, Plan>;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t passes_of_head = ceil_div(rule.V, kPassRows);
  const int passes = static_cast<int>(rule.HV / rule.H * passes_of_head);
  const Step step = {args,
                     num_slots,
                     num_conv_slots,
                     static_cast<int>(rule.HV / rule.H),
                     Divisor(static_cast<uint32_t>(passes_of_head * kPassRows)),
                     static_cast<int>(passes_of_head),
                     passes,
                     static_cast<int>(ceil_div(passes, cluster))};

  const dim3 grid(static_cast<unsigned>(cluster), static_cast<unsigned>(rule.H), static_cast<unsigned>(rule.N));
  const int stages = std::min(step.passes_of_block, Plan::kStages);
  const size_t floats = 3 * static_cast<size_t>(step.passes_of_block) * kPassRows +
                        static_cast<size_t>(passes) * (kPassRows / Rows::kGroups);
  const size_t bytes = static_cast<size_t>(stages) * Rows::kStageBytes + sizeof(float) * floats;
  launch_overlapping(step_kernel<In, State, kDim, Plan, kIsPlain>, grid, kThreads, bytes, cluster, stream, step);
}

// Few blocks have a multiprocessor's registers for themselves, more leave some to the next kernel's. Many blocks keep
// as much on its way as shared memory holds. Calls as models make them are planned so, plain and K = 128; one plan
// serves any number of blocks of the others.
template <class In, class State, int kDim>
void launch(const DecodeStepArgs& args, int64_t num_slots, int64_t num_conv_slots, cudaStream_t stream) {
  constexpr int kRows = kDim == 64 || kDim == 128 ? 2 : 1;
  constexpr bool kIsWide = sizeof(State) == 4;
  using Alone = Plan<kRows, kIsWide ? 2 : 4, 3, true>;
  using Some = Plan<kRows, kIsWide ? 2 : 4, 5, false>;
  using Many = Plan<kRows, kIsWide ? 3 : 4, 4, true>;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t items = rule.N * rule.H;
  const int passes = static_cast<int>(rule.HV / rule.H * ceil_div(rule.V, kPassRows<State, kDim, Some>));
  const int cluster = cluster_size(items, passes);
  const auto run = [&](auto plan, auto plain) {
    launch_plan<In, State, kDim, decltype(plan), plain()>(args, num_slots, num_conv_slots, cluster, stream);
  };
  if (!is_plain<In>(args)) return run(Some(), std::false_type());
  if constexpr (kDim == 128) {
    if (cluster == 1) return run(Many(), std::true_type());
    if (items * cluster <= num_multiprocessors()) return run(Alone(), std::true_type());
  }
  run(Some(), std::true_type());
}

}  // namespace

bool decode_step_supports(const DecodeStepArgs& args) {
  constexpr int64_t kMostRows = 8192;  // that shared memory holds
  constexpr int64_t kMostSequences = 65535;
  const TokenDeltaRuleArgs& rule = args.rule;
  const int64_t ratio = rule.HV / rule.H;
  return args.conv.conv_state.dtype == args.conv.x.dtype && is_key_dim(rule.K) && ratio <= kMostHeads &&
         ratio * (rule.V + kThreads) <= kMostRows && rule.N <= kMostSequences;
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
