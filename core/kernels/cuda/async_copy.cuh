// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run beside the program, and barriers that tell of their end.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cuda {

/// The address of shared memory as instructions take it.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes past the L1, or writes 16 bytes of zeros without reading.
__device__ inline void copy_async(uint32_t to, const void* from, bool is_zero) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_zero ? 0 : 16) : "memory");
}

/// Ends a group of this thread's copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

/// Makes this thread's writes to shared memory visible to the tensor cores of Hopper, which read it by another path.
__device__ inline void fence_for_tensor_cores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- barriers: 8 bytes of shared memory, phases of `count` arrivals
// --------------------------------------------------

__device__ inline void init_barrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

/// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the third.
__device__ inline void wait_at(uint32_t barrier, uint32_t parity) {
  uint32_t is_over = 0;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
#endif
  } while (is_over == 0);
}

}  // namespace xgdn::kernel::cuda
