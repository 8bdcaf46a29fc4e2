// SPDX-License-Identifier: Apache-2.0
// Two kernels: what all chunks need of keys and gates at once (chunk_factors.cuh), then the pass over each sequence's
// chunks (chunk_scan.cuh).
#include "core/kernels/cuda/chunk_gated_delta_rule.h"

#include <cuda_runtime.h>

#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/chunk_factors.cuh"
#include "core/kernels/cuda/chunk_scan.cuh"
#include "core/kernels/cuda/device_facts.h"
#include "core/kernels/cuda/launch.h"

namespace xgdn::kernel::cuda {
namespace {

constexpr const char* kOp = "chunk_gated_delta_rule";

// Calls f(integral_constant K) for a K that has kernels.
template <class F>
bool with_key_size(int64_t K, F&& f) {
  switch (K) {
    case 64:
      f(std::integral_constant<int, 64>());
      return true;
    case 128:
      f(std::integral_constant<int, 128>());
      return true;
    default:
      return false;
  }
}

template <int kK, int kGroups>
int stages_that_fit() {
  const auto memory = static_cast<size_t>(device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>());
  int stages = kMaxStages;
  while (stages > 0 && scan_memory<kK, kGroups>(stages) > memory) --stages;
  return stages;
}

ChunkFactors factors_in(const ChunkGatedDeltaRuleArgs& args) {
  auto* inverse = static_cast<ChunkSquare*>(args.workspace);
  ChunkSquare* scores = inverse + args.M * args.HV;
  return {inverse, scores, reinterpret_cast<ChunkGates*>(scores + args.M * args.HV)};
}

template <class Kernel, class Args>
void launch(Kernel kernel, int64_t blocks, int threads, size_t memory, cudaStream_t stream, const Args& args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, args);
  check_launch(kOp);
}

template <class State, int kK, int kGroups>
void scan(ScanKernel& kernel, cudaStream_t stream) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  kernel.num_stages = stages_that_fit<kK, kGroups>();
  launch(chunk_scan_kernel<State, kK, kGroups>, a.N * a.HV * (a.V / (kGroupRows * kGroups)),
         (kGroups + 1) * kGroupThreads, scan_memory<kK, kGroups>(kernel.num_stages), stream, kernel);
}

template <class State, int kK>
void scan(ScanKernel& kernel, cudaStream_t stream) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  // Two groups share what they read; one leaves more blocks, where they are few.
  const bool has_pairs = a.V % (2 * kGroupRows) == 0 && stages_that_fit<kK, 2>() > 0;
  if (has_pairs && 2 * a.N * a.HV * (a.V / (2 * kGroupRows)) > num_multiprocessors()) {
    scan<State, kK, 2>(kernel, stream);
  } else {
    scan<State, kK, 1>(kernel, stream);
  }
}

template <int kK>
void run(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  const ChunkFactors factors = factors_in(args);
  const bool is_q_aligned = is_aligned(args.q), is_k_aligned = is_aligned(args.k);
  if (args.M > 0) {
    launch(chunk_factors_kernel<kK>, args.M * args.H, kFactorThreads, sizeof(FactorMemory<kK>), stream,
           FactorsKernel{args, factors, is_q_aligned, is_k_aligned});
  }
  ScanKernel kernel = {args, factors, 0, is_q_aligned, is_k_aligned, is_aligned(args.v), is_aligned(args.out)};
  if (args.state.dtype == DType::kBFloat16) {
    scan<__nv_bfloat16, kK>(kernel, stream);
  } else {
    scan<float, kK>(kernel, stream);
  }
}

}  // namespace

bool chunk_supports(int64_t K, int64_t V) {
  bool fits = false;
  return V % kGroupRows == 0 && with_key_size(K, [&](auto k) { fits = stages_that_fit<k, 1>() > 0; }) && fits;
}

size_t workspace_bytes(const ChunkGatedDeltaRuleArgs& args) {
  return args.M * args.HV * (2 * sizeof(ChunkSquare) + sizeof(ChunkGates));
}

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  if (args.N == 0) return;
  with_key_size(args.K, [&](auto k) { run<k>(args, stream); });
}

}  // namespace xgdn::kernel::cuda
