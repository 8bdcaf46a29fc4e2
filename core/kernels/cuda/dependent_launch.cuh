// SPDX-License-Identifier: Apache-2.0
// Launches that overlap: on Hopper and later a kernel may be put on the multiprocessors while the one before it in the
// stream still runs, and waits there for its end. That hides what a launch costs, which is what a small step consists
// of.
//
// Several kernels may be on the device at once: a kernel lets the next one come before it has itself waited. The next
// one waits for the end of all blocks of this one, each of which has waited for the kernel before, and so for all.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/cuda/device_facts.h"

namespace xgdn::kernel::cuda {

/// Waits for the end of the kernel before this one in the stream. Every thread comes here before it leaves, and before
/// it reads or writes memory. It may read indices earlier, numbers of slots, lengths and tables: no kernel that lets
/// the next one come early writes those.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the kernel behind this one be launched once all blocks of this one have come here or are done. Those are on the
/// multiprocessors by then: what is launched early takes no room from them.
__device__ inline void let_next_kernel_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Comes first in every thread of a kernel for launch_overlapping.
__device__ inline void begin_overlapped() {
  let_next_kernel_launch();
  wait_for_kernel_before();
}

/// Starts to bring a row to the second-level cache; address and size are multiples of 16. Allowed ahead of the wait, be
/// it for what the kernel before still writes: nothing comes back that could be old, and all blocks read and write
/// through this cache.
__device__ inline void prefetch_row(const void* row, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(bytes));
#endif
}

/// The same of the line of an address, on any device.
__device__ inline void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Shared memory that a kernel gets without asking, less what those launched here have beside the launch's own.
inline constexpr size_t kUnaskedSharedBytes = 14 << 10;

/// Lets a kernel have all shared memory that the device gives to a block: the same wish from every thread and for every
/// launch, so that none undoes another's.
template <class... Params>
void ask_for_shared_memory(void (*kernel)(Params...)) {
  cudaFuncAttributes facts = {};
  cudaFuncGetAttributes(&facts, kernel);
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       most - static_cast<int>(facts.sharedSizeBytes));
}

/// A launch that overlaps with the one before it, in clusters of `cluster` blocks along x.
template <class... Params, class... Args>
void launch_overlapping(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, int cluster,
                        cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (has_overlapping_launches()) {
    cudaLaunchAttribute& overlaps = attributes[config.numAttrs++];
    overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlaps.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& clusters = attributes[config.numAttrs++];
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (shared_bytes > kUnaskedSharedBytes) ask_for_shared_memory(kernel);
  cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace xgdn::kernel::cuda
