// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run beside the program, and barriers that tell of their end.
#pragma once

#include <cuda.h>

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

/// The same without a choice.
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/// Copies 4 bytes.
__device__ inline void copy_async_word(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
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

/// Makes this thread's writes to shared memory visible to what reads it by another path on Hopper: tensor cores and
/// bulk copies.
__device__ inline void fence_shared_memory() {
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

/// Arrives, and lets the phase wait for `bytes` of bulk copies too (Hopper).
__device__ inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
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

// ---- stores to the blocks of a cluster (Hopper) ---------------------------------------------------------------------

/// Makes a barrier's initial value visible to the cluster, ahead of a barrier of the cluster itself.
__device__ inline void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Stores x in block `rank`, where this block has `to`, and tells its barrier of 4 bytes. The blocks' other stores are
/// not waited for, as a barrier of the cluster would.
__device__ inline void store_async(int rank, uint32_t to, uint32_t barrier, float x) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 to, barrier; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 barrier, %1, %2; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [barrier]; }" ::"r"(to),
      "r"(barrier), "r"(rank), "r"(__float_as_uint(x))
      : "memory");
#endif
}

/// As wait_at, for what other blocks of the cluster stored.
__device__ inline void wait_at_for_cluster(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t is_over = 0;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (is_over == 0);
#endif
}

// ---- bulk copies (Hopper): one thread starts them
// ---------------------------------------------------------------------

/// Copies `bytes`, a multiple of 16, and tells the barrier.
__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

/// Copies the map's box at [token, head, column] and tells the barrier.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int column, int head, int token,
                                uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(to),
      "l"(&map), "r"(column), "r"(head), "r"(token), "r"(barrier)
      : "memory");
#endif
}

/// Starts to copy shared memory to the map's box at [token, head, column], where `is_chosen`: no branch, for products
/// may be under way.
__device__ inline void store_box(const CUtensorMap& map, int column, int head, int token, uint32_t from,
                                 bool is_chosen) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; "
      "@p cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4]; }" ::"l"(&map),
      "r"(column), "r"(head), "r"(token), "r"(from), "r"(is_chosen ? 1 : 0)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

/// Waits until the shared memory of this thread's stores may be written again.
__device__ inline void wait_stores_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

/// A barrier of the 128 threads of a warp group, 0 to 14 of a block.
__device__ inline void sync_group(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

/// A barrier of a block's first warp groups, in a block whose group behind them has no barrier of its own.
__device__ inline void sync_first_groups(int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(count + 1), "r"(count * 128) : "memory");
}

}  // namespace xgdn::kernel::cuda
