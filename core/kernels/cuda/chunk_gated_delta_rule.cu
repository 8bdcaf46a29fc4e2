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
#include "core/kernels/cuda/tensor_map.h"

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

/// `is_early`: the kernel may start before the one before it has ended, and waits for it itself.
template <class Kernel, class Args>
void launch(Kernel kernel, int64_t blocks, int threads, size_t memory, bool is_early, cudaStream_t stream,
            const Args& args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory));
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = is_early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args);
  check_launch(kOp);
}

template <int kK, int kGroups, bool kByBoxes>
void scan(ScanKernel& kernel, cudaStream_t stream) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  kernel.num_stages = stages_that_fit<kK, kGroups>();
  launch(chunk_scan_kernel<kK, kGroups, kByBoxes>, a.N * a.HV * (a.V / (kGroupRows * kGroups)),
         (kGroups + 1) * kGroupThreads, scan_memory<kK, kGroups>(kernel.num_stages), a.M > 0 && has_clusters(), stream,
         kernel);
}

bool make_tensor_maps(ScanKernel& kernel) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  return has_clusters() && make_tensor_map(kernel.q_map, a.q, a.T, a.H, a.K, kChunk) &&
         make_tensor_map(kernel.k_map, a.k, a.T, a.H, a.K, kChunk) &&
         make_tensor_map(kernel.v_map, a.v, a.T, a.HV, a.V, kChunk) &&
         make_tensor_map(kernel.out_map, a.out, a.T, a.HV, a.V, kChunk);
}

template <int kK>
void scan(ScanKernel& kernel, cudaStream_t stream) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  if (!make_tensor_maps(kernel)) {
    scan<kK, 1, false>(kernel, stream);
    // Two groups share what they read; one leaves more blocks, where they are few.
  } else if (a.V % (2 * kGroupRows) == 0 && 2 * a.N * a.HV * (a.V / (2 * kGroupRows)) > num_multiprocessors()) {
    scan<kK, 2, true>(kernel, stream);
  } else {
    scan<kK, 1, true>(kernel, stream);
  }
}

template <int kK>
void run(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  auto* const factors = static_cast<ChunkFactors*>(args.workspace);
  ScanKernel kernel = {
      args, factors, 0, is_aligned(args.q), is_aligned(args.k), is_aligned(args.v), is_aligned(args.out), {},
      {},   {},      {}};
  if (args.M > 0) {
    launch(chunk_factors_kernel<kK>, args.M * args.H, kFactorThreads, sizeof(FactorMemory<kK>), false, stream,
           FactorsKernel{args, factors, kernel.is_q_aligned, kernel.is_k_aligned});
  }
  scan<kK>(kernel, stream);
}

}  // namespace

bool chunk_supports(int64_t K, int64_t V) {
  bool fits = false;
  return V % kGroupRows == 0 && with_key_size(K, [&](auto k) { fits = stages_that_fit<k, 1>() > 0; }) && fits;
}

size_t workspace_bytes(const ChunkGatedDeltaRuleArgs& args) {
  return args.M * args.HV * sizeof(ChunkFactors);
}

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  if (args.N == 0) return;
  with_key_size(args.K, [&](auto k) { run<k>(args, stream); });
}

}  // namespace xgdn::kernel::cuda
