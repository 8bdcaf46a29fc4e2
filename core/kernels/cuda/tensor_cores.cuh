// SPDX-License-Identifier: Apache-2.0
// Instructions of the tensor cores and of the matrices in shared memory that feed them.
//
// Fragments of a warp, 16 rows, with g = lane / 4 and t = lane % 4:
//   sum, f32       [tile of 8 columns][4]: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   left operand   [step of 16 columns][4], two bf16 each: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)
// so the sums of one product, rounded in pairs, are the left operand of the next. A warp group's product with 64 rows
// on Hopper gives its warp w the rows 16 w to 16 w + 15 in these fragments.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace xgdn::kernel::cuda {

/// Two bf16, the first in the lower half.
__device__ inline uint32_t pack_bf16(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// x rounded to the 11 bits that the tensor cores read of an f32.
__device__ inline uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

/// sum [16, 8] += a [16, 16] b [16, 8], bf16; b: rows 2t.. and 2t + 8.. of column g.
__device__ inline void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// sum [16, 8] += a [16, 8] b [8, 8], tf32; a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: rows t, t + 4 of
/// column g.
__device__ inline void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8 x 8 matrices of two-byte elements; lane l names row l % 8 of matrix l / 8. A lane gets (g, 2t..) of each.
__device__ inline void load_matrices(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

/// As load_matrices, transposed: a lane gets (2t.., g).
__device__ inline void load_matrices_transposed(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

/// An 8 x 8 matrix transposed between lanes.
__device__ inline uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// The reverse of load_matrices_transposed.
__device__ inline void store_matrices_transposed(uint32_t row, const uint32_t (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
#else
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = __shfl_sync(0xffffffffu, row, i * 8 + lane / 4) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(transpose_matrix(x[i])) : "memory");
  }
#endif
}

// ---- registers between the warp groups of a block (Hopper)
// -----------------------------------------------------------

/// Gives up a thread's registers above kCount; a whole warp group calls.
template <int kCount>
__device__ inline void leave_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

/// Waits for registers that others left, up to kCount; a whole warp group calls.
template <int kCount>
__device__ inline void take_registers() {
#if __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// ---- products of a warp group (Hopper)
// -------------------------------------------------------------------------------

#if __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasGroupProducts = true;

/// What the instructions take for a matrix in shared memory of 8 x 8 blocks whose rows of 16 bytes are neighbours: the
/// bytes from block to block along a row, and from row to row of blocks.
__device__ inline uint64_t block_descriptor(uint32_t address, uint32_t next_block, uint32_t next_blocks) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(next_block >> 4) << 16 |
         static_cast<uint64_t>(next_blocks >> 4) << 32;
}

/// The same of a matrix in panels of 64 columns, whose rows of 128 bytes are swizzled: the bytes between panels and
/// between 8 rows.
__device__ inline uint64_t panel_descriptor(uint32_t address, uint32_t next_panel, uint32_t next_rows) {
  return block_descriptor(address, next_panel, next_rows) | uint64_t{1} << 62;
}

#define XGDN_TILE(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define XGDN_TILES4(i) XGDN_TILE(i), XGDN_TILE(i + 1), XGDN_TILE(i + 2), XGDN_TILE(i + 3)

/// sum [64, 8 kTiles] (+)= a [64, 16] b. kTransposed: a column's neighbours in memory are those of its row, else those
/// of its column. Only starts: sum and a must stay as they are until wait_products.
template <bool kTransposed, int kTiles>
__device__ inline void start_product(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  constexpr int kT = kTransposed ? 1 : 0;
  const int add = adds ? 1 : 0;
  if constexpr (kTiles == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%"
        "29,"
        "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%"
        "57,"
        "%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, %70; }"
        : XGDN_TILES4(0), XGDN_TILES4(4), XGDN_TILES4(8), XGDN_TILES4(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kT));
  } else {
    static_assert(kTiles == 8);
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%"
        "29,"
        "%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38; }"
        : XGDN_TILES4(0), XGDN_TILES4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kT));
  }
}

/// sum's first kCount tiles (+)= a [64, 16] b, columns of b side by side in memory. As start_product.
template <int kCount>
__device__ inline void start_part_product(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  const int add = adds ? 1 : 0;
  if constexpr (kCount == 8) {
    start_product<false>(sum, a, b, adds);
  } else if constexpr (kCount == 6) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %29, 0; wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, {%24,%25,%26,%27}, "
        "%28, p, 1, 1, 0; }"
        : XGDN_TILES4(0), XGDN_TILE(4), XGDN_TILE(5)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  } else if constexpr (kCount == 4) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0; }"
        : XGDN_TILES4(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  } else {
    static_assert(kCount == 2);
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1, 0; }"
        : XGDN_TILE(0), XGDN_TILE(1)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
  }
}

#undef XGDN_TILES4
#undef XGDN_TILE

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
__device__ inline void wait_products() {
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

#else
inline constexpr bool kHasGroupProducts = false;

template <bool kTransposed, int kTiles>
__device__ inline void start_product(float (&)[kTiles][4], const uint32_t (&)[4], uint64_t, bool) {}
template <int kCount>
__device__ inline void start_part_product(float (&)[8][4], const uint32_t (&)[4], uint64_t, bool) {}
__device__ inline uint64_t block_descriptor(uint32_t, uint32_t, uint32_t) {
  return 0;
}
__device__ inline uint64_t panel_descriptor(uint32_t, uint32_t, uint32_t) {
  return 0;
}
__device__ inline void fence_products() {}
__device__ inline void commit_products() {}
template <int kGroups>
__device__ inline void wait_products() {}
template <int kTiles>
__device__ inline void pin(float (&)[kTiles][4]) {}
#endif

}  // namespace xgdn::kernel::cuda
