// SPDX-License-Identifier: Apache-2.0
// Products of a warp group on Hopper: 64 rows of a, sums in f32, b in shared memory, started and waited for later.
//
// Sums are fragments as in mma_sync.cuh, a warp of the group has 16 rows. Matrices in shared memory are blocks of 64
// columns, rows of 128 bytes, whose 16-byte pieces are exchanged within 8 rows (the 128-byte swizzle).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace xgdn::kernel::cuda {

#if __CUDA_ARCH_FEAT_SM90_ALL

/// What the instructions take for a matrix: where it begins, bytes between blocks of 64 columns (of b transposed) and
/// between blocks of 8 rows.
__device__ inline uint64_t group_matrix(uint32_t address, uint32_t column_block) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowBlock = 8 * 128;
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(column_block >> 4) << 16 |
         kRowBlock >> 4 << 32 | kSwizzle128;
}

#define XGDN_SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define XGDN_SUM4(i) XGDN_SUM(i), XGDN_SUM(i + 1), XGDN_SUM(i + 2), XGDN_SUM(i + 3)
#define XGDN_SUM8(i) XGDN_SUM4(i), XGDN_SUM4(i + 4)

#define XGDN_REGISTERS_32                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"

#define XGDN_REGISTERS_64                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
  "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define XGDN_REGISTERS_128                                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"   \
  "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
  "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76," \
  "%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,"    \
  "%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120," \
  "%121,%122,%123,%124,%125,%126,%127"

/// sum [64, 8 kTiles] (+)= a b^T, columns of both side by side in memory, 16 of them.
template <class Element, int kTiles>
__device__ inline void start_product(float (&sum)[kTiles][4], uint64_t a, uint64_t b, bool adds) {
  constexpr bool kIsBFloat16 = std::is_same_v<Element, __nv_bfloat16>;
  const int add = adds ? 1 : 0;
  if constexpr (kTiles == 8) {
    if constexpr (kIsBFloat16) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
          "{" XGDN_REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0; }"
          : XGDN_SUM8(0)
          : "l"(a), "l"(b), "r"(add));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
          "{" XGDN_REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0; }"
          : XGDN_SUM8(0)
          : "l"(a), "l"(b), "r"(add));
    }
  } else if constexpr (kTiles == 16) {
    if constexpr (kIsBFloat16) {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
          "{" XGDN_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0; }"
          : XGDN_SUM8(0), XGDN_SUM8(8)
          : "l"(a), "l"(b), "r"(add));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
          "{" XGDN_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0; }"
          : XGDN_SUM8(0), XGDN_SUM8(8)
          : "l"(a), "l"(b), "r"(add));
    }
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}

/// sum [64, 8 kTiles] += a [64, 16] b, whose rows are side by side in memory. a must stay as it is until the end.
template <class Element, int kTiles>
__device__ inline void start_product(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool kIsBFloat16 = std::is_same_v<Element, __nv_bfloat16>;
  if constexpr (kTiles == 8) {
    if constexpr (kIsBFloat16) {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
          "{" XGDN_REGISTERS_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1; }"
          : XGDN_SUM8(0)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" XGDN_REGISTERS_32
          "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1; }"
          : XGDN_SUM8(0)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
  } else if constexpr (kTiles == 16) {
    if constexpr (kIsBFloat16) {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
          "{" XGDN_REGISTERS_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1; }"
          : XGDN_SUM8(0), XGDN_SUM8(8)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" XGDN_REGISTERS_64
          "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1; }"
          : XGDN_SUM8(0), XGDN_SUM8(8)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
  } else if constexpr (kTiles == 32) {
    if constexpr (kIsBFloat16) {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
          "{" XGDN_REGISTERS_128 "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1; }"
          : XGDN_SUM8(0), XGDN_SUM8(8), XGDN_SUM8(16), XGDN_SUM8(24)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
      asm volatile(
          "{ .reg .pred p; setp.eq.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
          "{" XGDN_REGISTERS_128 "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1; }"
          : XGDN_SUM8(0), XGDN_SUM8(8), XGDN_SUM8(16), XGDN_SUM8(24)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}

#undef XGDN_REGISTERS_128
#undef XGDN_REGISTERS_64
#undef XGDN_REGISTERS_32
#undef XGDN_SUM8
#undef XGDN_SUM4
#undef XGDN_SUM

/// Before products whose registers were written since the last ones.
__device__ inline void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Ends a group of started products.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kGroups groups are under way.
template <int kGroups>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

/// Keeps the compiler from moving reads and writes of sums across this point.
template <int kTiles>
__device__ inline void pin(float (&sum)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(sum[i][j])::"memory");
  }
}

/// Registers of a thread of this warp group from here on.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Makes this thread's writes to shared memory visible to products, which read it by another path.
__device__ inline void fence_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
  while (is_over == 0) {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}

#endif

}  // namespace xgdn::kernel::cuda
