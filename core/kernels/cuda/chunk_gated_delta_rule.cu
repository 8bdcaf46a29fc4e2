// SPDX-License-Identifier: Apache-2.0
// Two kernels: what all chunks need of keys and gates at once (chunk_factors.cuh), then the pass over each sequence's
// chunks (chunk_scan.cuh); where long sequences are cut into pieces, between them a pass for the states at the cuts.
#include "core/kernels/cuda/chunk_gated_delta_rule.h"

#include <cuda_runtime.h>

#include <algorithm>

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

template <int kK, int kGroups, bool kByBoxes, bool kHasOutputs>
void launch_scan(ScanKernel& kernel, int64_t blocks, cudaStream_t stream) {
  kernel.num_stages = stages_that_fit<kK, kGroups>();
  launch(chunk_scan_kernel<kK, kGroups, kByBoxes, kHasOutputs>, blocks, (kGroups + 1) * kGroupThreads,
         scan_memory<kK, kGroups>(kernel.num_stages), kernel.args.M > 0 && has_clusters(), stream, kernel);
}

/// Of so many pieces. Each has the rows of its state, and those of its map where it is scanned for one.
template <int kK, bool kHasOutputs>
void scan(ScanKernel& kernel, int64_t pieces, cudaStream_t stream) {
  const int64_t map_rows = !kHasOutputs && kernel.split.jumps() ? kK : 0;
  const int64_t V = kernel.args.V;
  const int64_t blocks = pieces * kernel.args.HV * ((V + map_rows) / kGroupRows);
  if (!kernel.copies_boxes) {
    launch_scan<kK, 1, false, kHasOutputs>(kernel, blocks, stream);
    // Two groups share what they read; one leaves more blocks, where they are few.
  } else if (V % (2 * kGroupRows) == 0 && map_rows % (2 * kGroupRows) == 0 && blocks > num_multiprocessors()) {
    launch_scan<kK, 2, true, kHasOutputs>(kernel, blocks / 2, stream);
  } else {
    launch_scan<kK, 1, true, kHasOutputs>(kernel, blocks, stream);
  }
}

bool make_tensor_maps(ScanKernel& kernel) {
  const ChunkGatedDeltaRuleArgs& a = kernel.args;
  return has_clusters() && make_tensor_map(kernel.q_map, a.q, a.T, a.H, a.K, kChunk) &&
         make_tensor_map(kernel.k_map, a.k, a.T, a.H, a.K, kChunk) &&
         make_tensor_map(kernel.v_map, a.v, a.T, a.HV, a.V, kChunk) &&
         make_tensor_map(kernel.out_map, a.out, a.T, a.HV, a.V, kChunk);
}

ChunkSplit split_of(const ChunkGatedDeltaRuleArgs& args) {
  const SplitFacts facts = {num_multiprocessors(), args.HV * (args.V / kGroupRows), args.N,
                            std::min(ceil_div(args.max_len, kChunk), args.M)};
  return choose_split(facts);
}

/// The workspace: factors, ends, maps.
size_t factor_bytes(const ChunkGatedDeltaRuleArgs& a) {
  return a.M * a.HV * sizeof(ChunkFactors);
}

CutMemory cut_memory(const ChunkGatedDeltaRuleArgs& a, int64_t cuts) {
  char* const ends = static_cast<char*>(a.workspace) + factor_bytes(a);
  return {reinterpret_cast<float*>(ends), ends + cuts * a.HV * end_bytes(a.K, a.V), map_bytes(a.K, a.V)};
}

template <int kK>
void run(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  auto* const factors = static_cast<ChunkFactors*>(args.workspace);
  ScanKernel kernel = {};
  kernel.args = args;
  kernel.factors = factors;
  kernel.split = split_of(args);
  const int64_t cuts = kernel.split.most_cuts(args.N, args.M);
  kernel.cuts = cut_memory(args, cuts);
  kernel.is_q_aligned = is_aligned(args.q);
  kernel.is_k_aligned = is_aligned(args.k);
  kernel.is_v_aligned = is_aligned(args.v);
  kernel.is_out_aligned = is_aligned(args.out);
  kernel.copies_boxes = make_tensor_maps(kernel);
  if (args.M > 0) {
    launch(chunk_factors_kernel<kK>, args.M * args.H, kFactorThreads, sizeof(FactorMemory<kK>), false, stream,
           FactorsKernel{args, factors, kernel.is_q_aligned, kernel.is_k_aligned});
  }
  if (kernel.split.cuts()) scan<kK, false>(kernel, cuts, stream);
  scan<kK, true>(kernel, args.N + cuts, stream);
}

}  // namespace

bool chunk_supports(int64_t K, int64_t V) {
  bool fits = false;
  return V % kGroupRows == 0 && with_key_size(K, [&](auto k) { fits = stages_that_fit<k, 1>() > 0; }) && fits;
}

size_t workspace_bytes(const ChunkGatedDeltaRuleArgs& args) {
  const int64_t cuts = split_of(args).most_cuts(args.N, args.M);
  return factor_bytes(args) + cuts * args.HV * (end_bytes(args.K, args.V) + map_bytes(args.K, args.V));
}

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream) {
  if (args.N == 0) return;
  with_key_size(args.K, [&](auto k) { run<k>(args, stream); });
}

}  // namespace xgdn::kernel::cuda
