// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/cuda/gdn_gating.h"

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void gating_kernel(const __grid_constant__ GdnGatingArgs args, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  begin_overlapped();
  if (i >= count) return;
  const int64_t token = i / args.HV, head = i % args.HV;
  RawScalar a, b, A_log, dt_bias;
  a.load(args.a.dtype, row_of(args.a, token, 0), head);
  b.load(args.b.dtype, row_of(args.b, token, 0), head);
  A_log.load(args.A_log.dtype, args.A_log.data, head);
  dt_bias.load(args.dt_bias.dtype, args.dt_bias.data, head);
  const float g =
      log_decay(a.widened(args.a.dtype), A_log.widened(args.A_log.dtype), dt_bias.widened(args.dt_bias.dtype));
  store_scalar(args.g.dtype, row_of(args.g, token, 0), head, g);
  store_scalar(args.beta.dtype, row_of(args.beta, token, 0), head, sigmoid(b.widened(args.b.dtype)));
}

}  // namespace

void gdn_gating(const GdnGatingArgs& args, int64_t T, cudaStream_t stream) {
  const int64_t count = T * args.HV;
  if (count == 0) return;
  launch_overlapping(gating_kernel, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, /*shared_bytes=*/0,
                     /*cluster=*/1, stream, args, count);
  check_launch("gdn_gating");
}

}  // namespace xgdn::kernel::cuda
