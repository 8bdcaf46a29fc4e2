// SPDX-License-Identifier: Apache-2.0
// out = silu(gate) * up, of an MLP;  out = x * sigmoid(gate), of attention.
//
// A thread has 8 neighbouring elements. Rounding: inputs are widened exactly, all is f32, out is rounded once.
#include "core/kernels/cuda/elementwise_gates.h"

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/packets.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 256;

// Letters of sigmoid_and_mul; kIsSilu: x is `up`, and H is 1.
template <class Element, bool kIsSilu, bool kIsWhole>
__global__ void __launch_bounds__(kThreads) gate_rows(SigmoidAndMulArgs args, int64_t packets, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  begin_overlapped();
  if (i >= count) return;
  const int64_t row = i / packets;
  const int64_t first = i % packets * kPacket;
  const int64_t token = row / args.H;
  const int64_t head = row % args.H;
  RawPacket<Element, kIsWhole> raw_x, raw_gate;
  raw_x.load(row_of<Element>(args.x, token, head), first, args.D);
  raw_gate.load(row_of<Element>(args.gate, token, head), first, args.D);
  float x[kPacket];
  float gate[kPacket];
  raw_x.widen(x);
  raw_gate.widen(gate);
#pragma unroll
  for (int j = 0; j < kPacket; ++j) x[j] *= kIsSilu ? silu(gate[j]) : sigmoid(gate[j]);
  store_packet<kIsWhole>(row_of<Element>(args.out, token, head), first, args.D, x);
}

template <bool kIsSilu>
void gate(const SigmoidAndMulArgs& args, int64_t num_tokens, cudaStream_t stream, const char* op) {
  const int64_t packets = ceil_div(args.D, kPacket);
  const int64_t count = num_tokens * args.H * packets;
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  const bool is_whole = args.D % kPacket == 0 && is_aligned(args.x) && is_aligned(args.gate) && is_aligned(args.out);
  with_element(args.out.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto kernel = is_whole ? gate_rows<Element, kIsSilu, true> : gate_rows<Element, kIsSilu, false>;
    launch_overlapping(kernel, blocks, kThreads, /*shared_bytes=*/0, /*cluster=*/1, stream, args, packets, count);
  });
  check_launch(op);
}

}  // namespace

void silu_and_mul(const SiluAndMulArgs& args, int64_t num_tokens, cudaStream_t stream) {
  SigmoidAndMulArgs rows = {.H = 1, .D = args.I, .x = args.up, .gate = args.gate, .out = args.out};
  rows.x.head_stride = rows.gate.head_stride = rows.out.head_stride = 0;
  gate<true>(rows, num_tokens, stream, "silu_and_mul");
}

void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t num_tokens, cudaStream_t stream) {
  gate<false>(args, num_tokens, stream, "sigmoid_and_mul");
}

}  // namespace xgdn::kernel::cuda
