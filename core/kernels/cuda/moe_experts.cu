// SPDX-License-Identifier: Apache-2.0
// out[t] = sum over a of weights[t, a] * down(silu(gate(x[t])) * up(x[t])) of expert chosen[t, a].
//
// Four kernels, launched from what the host knows: the visits sorted by expert, both products, and the sum of each
// token, ascending a. Rounding: products and sums are f32; silu(gate) * up and what an expert gives are rounded to the
// dtype, out once.
#include "core/kernels/cuda/moe_experts.h"

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/expert_products.cuh"
#include "core/kernels/cuda/expert_visits.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/packets.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kSumThreads = 256;

// Hopper alone has them; its successors have others.
bool has_warp_group_products() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9;
}

// Visits that a block works on: about as many as an expert has.
int64_t columns_for(const MoeExpertsArgs& args) {
  if (args.x.dtype == DType::kFloat32) return kF32Tile;
  const int64_t mean = ceil_div(args.T * args.A, args.E);
  return mean <= 8 ? 16 : mean <= 24 ? 32 : mean <= 64 ? 64 : 128;
}

// The parts of the workspace, each at a multiple of 16 bytes.
struct Workspace {
  ExpertVisits visits;
  char* gated = nullptr;    // [V, I], sorted
  char* outputs = nullptr;  // [V, D]
  int64_t bytes = 0;
};

Workspace workspace(const MoeExpertsArgs& args) {
  Workspace w;
  const int64_t V = args.T * args.A;
  const int64_t size = size_of(args.x.dtype);
  const auto take = [&](int64_t bytes) {
    char* part = static_cast<char*>(args.workspace) + w.bytes;
    w.bytes += ceil_div(bytes, 16) * 16;
    return part;
  };
  const int64_t max_tiles = max_visit_tiles(V, args.E, columns_for(args));
  w.visits = {.sorted = reinterpret_cast<int*>(take(V * static_cast<int64_t>(sizeof(int)))),
              .tiles = reinterpret_cast<VisitTile*>(take(max_tiles * static_cast<int64_t>(sizeof(VisitTile)))),
              .num_tiles = reinterpret_cast<int*>(take(static_cast<int64_t>(sizeof(int)))),
              .max_tiles = static_cast<int>(max_tiles)};
  w.gated = take(V * args.I * size);
  w.outputs = take(V * args.D * size);
  return w;
}

template <class Element, bool kIsWhole>
__global__ void __launch_bounds__(kSumThreads) sum_experts(MoeExpertsArgs args, const void* outputs, int64_t packets) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  begin_overlapped();
  if (i >= args.T * packets) return;
  const int64_t token = i / packets;
  const int64_t first = i % packets * kPacket;
  const Element* output = static_cast<const Element*>(outputs) + token * args.A * args.D;
  float sum[kPacket] = {};
#pragma unroll 4
  for (int64_t a = 0; a < args.A; ++a) {
    RawPacket<Element, kIsWhole> raw;
    raw.load(output + a * args.D, first, args.D);
    const float weight = widened(*row_of<Element>(args.weights, token, a));
    float x[kPacket];
    raw.widen(x);
#pragma unroll
    for (int j = 0; j < kPacket; ++j) sum[j] = fmaf(weight, x[j], sum[j]);
  }
  store_packet<kIsWhole>(row_of<Element>(args.out, token, 0), first, args.D, sum);
}

template <class Kernel>
void launch(Kernel kernel, int64_t outputs, int64_t outputs_of_block, int threads, int shared_bytes,
            const ExpertProductArgs& product, cudaStream_t stream) {
  const int64_t blocks = product.visits.max_tiles * ceil_div(outputs, outputs_of_block);
  launch_overlapping(kernel, static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), /*cluster=*/1,
                     stream, product);
  check_launch("moe_experts");
}

template <class Element, class Tiles>
void multiply(const ExpertProductArgs& gate_up, const ExpertProductArgs& down, cudaStream_t stream) {
  launch(multiply_experts<Element, Tiles, true>, gate_up.outputs, Tiles::kRows / 2, Tiles::kThreads,
         Tiles::kSharedBytes, gate_up, stream);
  launch(multiply_experts<Element, Tiles, false>, down.outputs, Tiles::kRows, Tiles::kThreads, Tiles::kSharedBytes,
         down, stream);
}

template <class Element>
void multiply_hopper(const ExpertProductArgs& gate_up, const ExpertProductArgs& down, cudaStream_t stream) {
  using Tiles = HopperProductTiles;
  launch(multiply_experts_hopper<Element, true>, gate_up.outputs, Tiles::kRows / 2, Tiles::kThreads,
         Tiles::kSharedBytes, gate_up, stream);
  launch(multiply_experts_hopper<Element, false>, down.outputs, Tiles::kRows, Tiles::kThreads, Tiles::kSharedBytes,
         down, stream);
}

void multiply_f32(const ExpertProductArgs& gate_up, const ExpertProductArgs& down, cudaStream_t stream) {
  launch(multiply_experts_f32<true>, gate_up.outputs, kF32Tile / 2, kF32ProductThreads, 0, gate_up, stream);
  launch(multiply_experts_f32<false>, down.outputs, kF32Tile, kF32ProductThreads, 0, down, stream);
}

template <class Element>
void multiply(int64_t columns, const ExpertProductArgs& gate_up, const ExpertProductArgs& down, cudaStream_t stream) {
  switch (columns) {
    case 16:
      return multiply<Element, ProductTiles<16, 2, 6>>(gate_up, down, stream);
    case 32:
      return multiply<Element, ProductTiles<32, 4, 4>>(gate_up, down, stream);
    case 64:
      return multiply<Element, ProductTiles<64, 4, 4>>(gate_up, down, stream);
    default:
      return has_warp_group_products() ? multiply_hopper<Element>(gate_up, down, stream)
                                       : multiply<Element, ProductTiles<128, 4, 3>>(gate_up, down, stream);
  }
}

}  // namespace

bool moe_experts_supports(const MoeExpertsArgs& args) {
  InRows x = args.x;
  x.head_stride = 0;
  return args.E <= kMaxExperts && args.D % kPacket == 0 && args.I % kPacket == 0 && is_aligned(x) &&
         reinterpret_cast<uintptr_t>(args.gate_up) % 16 == 0 && reinterpret_cast<uintptr_t>(args.down) % 16 == 0;
}

size_t workspace_bytes(const MoeExpertsArgs& args) {
  return static_cast<size_t>(workspace(args).bytes);
}

void moe_experts(const MoeExpertsArgs& args, cudaStream_t stream) {
  const int64_t V = args.T * args.A;
  if (args.T * args.D == 0) return;
  const Workspace w = workspace(args);
  const int64_t columns = columns_for(args);
  if (V > 0 && args.I > 0) {
    launch_overlapping(sort_by_expert, 1, kSortThreads, 2 * static_cast<size_t>(args.E) * sizeof(int), /*cluster=*/1,
                       stream, args.chosen, static_cast<int>(V), static_cast<int>(args.E), static_cast<int>(columns),
                       w.visits);
    check_launch("moe_experts");
    const ExpertProductArgs gate_up = {.visits = w.visits,
                                       .x = args.x.data,
                                       .x_stride = args.x.token_stride,
                                       .choices = static_cast<int>(args.A),
                                       .weight = args.gate_up,
                                       .expert_stride = 2 * args.I * args.D,
                                       .depth = args.D,
                                       .outputs = args.I,
                                       .y = w.gated,
                                       .y_is_sorted = true};
    const ExpertProductArgs down = {.visits = w.visits,
                                    .x = w.gated,
                                    .x_stride = args.I,
                                    .weight = args.down,
                                    .expert_stride = args.D * args.I,
                                    .depth = args.I,
                                    .outputs = args.D,
                                    .y = w.outputs};
    switch (args.x.dtype) {
      case DType::kFloat32:
        multiply_f32(gate_up, down, stream);
        break;
      case DType::kBFloat16:
        multiply<__nv_bfloat16>(columns, gate_up, down, stream);
        break;
      case DType::kFloat16:
        multiply<__half>(columns, gate_up, down, stream);
        break;
    }
  }
  const int64_t packets = ceil_div(args.D, kPacket);
  const auto blocks = static_cast<unsigned>(ceil_div(args.T * packets, kSumThreads));
  OutRows out = args.out;
  out.head_stride = 0;
  const bool is_whole = args.D % kPacket == 0 && is_aligned(out);
  with_element(args.x.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto sum = is_whole ? sum_experts<Element, true> : sum_experts<Element, false>;
    launch_overlapping(sum, blocks, kSumThreads, /*shared_bytes=*/0, /*cluster=*/1, stream, args, w.outputs, packets);
  });
  check_launch("moe_experts");
}

}  // namespace xgdn::kernel::cuda
