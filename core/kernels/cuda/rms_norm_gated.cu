// SPDX-License-Identifier: Apache-2.0
// A warp takes a row (token, head). Rounding: all is f32, rounded once at the end.
#include "core/kernels/cuda/rms_norm_gated.h"

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/launch.h"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 32;
constexpr int64_t kRows = kThreads / kLanes;

__global__ void __launch_bounds__(kThreads)
    norm_kernel(const __grid_constant__ RmsNormGatedArgs args, int64_t num_rows) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  begin_overlapped();
  if (index >= num_rows) return;
  const int lane = threadIdx.x % kLanes;
  const int64_t token = index / args.HV, head = index % args.HV;
  const char* const x = row_of(args.x, token, head);
  const char* const z = row_of(args.z, token, head);
  char* const out = row_of(args.out, token, head);
  float sum = 0.0f;
  for (int64_t i = lane; i < args.V; i += kLanes) {
    const float xi = load_scalar(args.x.dtype, x, i);
    sum = fmaf(xi, xi, sum);
  }
  const float factor = rsqrtf(sum_over_lanes<kLanes>(sum) / static_cast<float>(args.V) + args.eps);
  for (int64_t i = lane; i < args.V; i += kLanes) {  // a lane writes what it alone has read, so out may be x or z
    const float normed = load_scalar(args.x.dtype, x, i) * factor * load_scalar(args.weight.dtype, args.weight.data, i);
    store_scalar(args.out.dtype, out, i, normed * silu(load_scalar(args.z.dtype, z, i)));
  }
}

}  // namespace

void rms_norm_gated(const RmsNormGatedArgs& args, int64_t T, cudaStream_t stream) {
  const int64_t rows = T * args.HV;
  if (rows == 0) return;
  launch_overlapping(norm_kernel, static_cast<unsigned>(ceil_div(rows, kRows)), kThreads, /*shared_bytes=*/0,
                     /*cluster=*/1, stream, args, rows);
  check_launch("rms_norm_gated");
}

}  // namespace xgdn::kernel::cuda
