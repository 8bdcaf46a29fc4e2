// SPDX-License-Identifier: Apache-2.0
// Products of a warp group on Hopper in the element type of a call, __nv_bfloat16 or __half, and of more shapes than
// tensor_cores.cuh has. Started here, waited for there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {

/// Byte of a 16-byte piece of a row in a matrix of so many rows: blocks of 64 columns, whose pieces are exchanged
/// within 8 rows (the 128-byte swizzle).
__device__ inline uint32_t group_swizzled(int row, int piece, int rows) {
  return static_cast<uint32_t>((piece / 8 * rows + row) * 128 + ((piece ^ row) & 7) * 16);
}

#if __CUDA_ARCH_FEAT_SM90_ALL

/// A matrix of blocks of 64 columns, as group_swizzled lays it out. column_block: bytes from one to the next, for the
/// right side of a product whose rows are side by side in memory.
__device__ inline uint64_t group_matrix(uint32_t address, uint32_t column_block = 16) {
  constexpr uint32_t kRowBlock = 8 * 128;
  return panel_descriptor(address, column_block, kRowBlock);
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

// One instruction for both types. Outputs and inputs are in parentheses, because of their commas.
#define XGDN_LIST(...) __VA_ARGS__
#define XGDN_GROUP_PRODUCT(before, shape, operands, outputs, inputs)                       \
  do {                                                                                     \
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {                                \
      asm volatile(before "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 " operands \
                   : XGDN_LIST outputs                                                     \
                   : XGDN_LIST inputs);                                                    \
    } else {                                                                               \
      asm volatile(before "wgmma.mma_async.sync.aligned." shape ".f32.f16.f16 " operands   \
                   : XGDN_LIST outputs                                                     \
                   : XGDN_LIST inputs);                                                    \
    }                                                                                      \
  } while (false)

/// sum [64, 8 kTiles] (+)= a b^T, columns of both side by side in memory, 16 of them.
template <class Element, int kTiles>
__device__ inline void start_product(float (&sum)[kTiles][4], uint64_t a, uint64_t b, bool adds) {
  const int add = adds ? 1 : 0;
  if constexpr (kTiles == 8) {
    XGDN_GROUP_PRODUCT("{ .reg .pred p; setp.ne.b32 p, %34, 0; ", "m64n64k16",
                       "{" XGDN_REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0; }", (XGDN_SUM8(0)),
                       ("l"(a), "l"(b), "r"(add)));
  } else if constexpr (kTiles == 16) {
    XGDN_GROUP_PRODUCT("{ .reg .pred p; setp.ne.b32 p, %66, 0; ", "m64n128k16",
                       "{" XGDN_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0; }", (XGDN_SUM8(0), XGDN_SUM8(8)),
                       ("l"(a), "l"(b), "r"(add)));
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}

/// sum [64, 8 kTiles] += a [64, 16] b, whose rows are side by side in memory. a must stay as it is until the end.
template <class Element, int kTiles>
__device__ inline void start_product(float (&sum)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kTiles == 8) {
    XGDN_GROUP_PRODUCT("{ .reg .pred p; setp.eq.b32 p, 0, 0; ", "m64n64k16",
                       "{" XGDN_REGISTERS_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1; }", (XGDN_SUM8(0)),
                       ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)));
  } else if constexpr (kTiles == 16) {
    XGDN_GROUP_PRODUCT("{ .reg .pred p; setp.eq.b32 p, 0, 0; ", "m64n128k16",
                       "{" XGDN_REGISTERS_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1; }", (XGDN_SUM8(0), XGDN_SUM8(8)),
                       ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)));
  } else if constexpr (kTiles == 32) {
    XGDN_GROUP_PRODUCT("{ .reg .pred p; setp.eq.b32 p, 0, 0; ", "m64n256k16",
                       "{" XGDN_REGISTERS_128 "}, {%128,%129,%130,%131}, %132, p, 1, 1, 1; }",
                       (XGDN_SUM8(0), XGDN_SUM8(8), XGDN_SUM8(16), XGDN_SUM8(24)),
                       ("r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)));
  } else {
    static_assert(kTiles == 0, "no such product");
  }
}

#undef XGDN_GROUP_PRODUCT
#undef XGDN_LIST
#undef XGDN_REGISTERS_128
#undef XGDN_REGISTERS_64
#undef XGDN_REGISTERS_32
#undef XGDN_SUM8
#undef XGDN_SUM4
#undef XGDN_SUM

#endif

}  // namespace xgdn::kernel::cuda
