// SPDX-License-Identifier: Apache-2.0
// A kernel of Hopper that starts while the one before it ends. Launched with programmatic stream serialization.
#pragma once

namespace xgdn::kernel::cuda {

/// Lets the next kernel's blocks start where there is room, once every block has called or ended.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernel before has ended and its writes are seen.
__device__ inline void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace xgdn::kernel::cuda
