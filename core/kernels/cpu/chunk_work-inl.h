// SPDX-License-Identifier: Apache-2.0
// What a work item of chunk_gated_delta_rule keeps in memory, and how many bf16 parts stand for a value in each
// operand. The maths and its rounding: chunk_gated_delta_rule.cpp.
#if defined(XGDN_CORE_KERNELS_CPU_CHUNK_WORK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CHUNK_WORK_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CHUNK_WORK_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CHUNK_WORK_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "core/kernels/cpu/chunk_gated_delta_rule.h"
#include "core/kernels/cpu/packed_product-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kBlock = 16;        // tokens: the decay's and the solve's blocks
constexpr size_t kStateTokens = 64;  // in which the state is rounded once, where it hardly decays
constexpr size_t kMaxDim = 256;
constexpr size_t kGroup = 2;               // panels of V that pass through a chunk together
constexpr float kSmallestLog = -86.0f;     // below it a decay is zero: nothing here is subnormal
constexpr float kSmallestGate = -1000.0f;  // of one token; its exp is zero many times over

// Tokens of a chunk, and of a strip, the granularity of triangular products.
template <size_t kChunkTokens, size_t kStripTokens>
struct ChunkSizes {
  static constexpr size_t kChunk = kChunkTokens;
  static constexpr size_t kStrip = kStripTokens;
  static constexpr size_t kBlocks = kChunk / kBlock;
  static constexpr bool kKeepsRest = kChunk < kStateTokens;
  static constexpr size_t kSquare = kChunk * kChunk;
  static constexpr size_t kGroupSize = kGroup * kChunk * kPanel;
  static_assert(kChunk == kStateTokens || 2 * kChunk == kStateTokens);
  static_assert(kChunk == 2 * kStrip);  // a buffer of strips of tokens holds two strips of K
};

// How many bf16 parts stand for a value in each operand (see "Rounding").
struct BFloat16Mode : ChunkSizes<64, 32> {
  using Element = uint16_t;
  static constexpr size_t kDepthStep = 32;
  static constexpr size_t kKeys = 1;
  static constexpr size_t kState = 2;
  static constexpr size_t kInverse = 2;
  static constexpr size_t kErrors = 2;
  static constexpr size_t kScores = 2;
  static constexpr size_t kWrites = 2;
  static constexpr size_t kUpdates = 2;
};

// With 64 a token would take 1.2 times as many multiply-adds; tiles are fed by chunks of 64.
struct Float32Mode : ChunkSizes<32, 16> {
  using Element = float;
  static constexpr size_t kDepthStep = 1;
  static constexpr size_t kKeys = 1;
  static constexpr size_t kState = 1;
  static constexpr size_t kInverse = 1;
  static constexpr size_t kErrors = 1;
  static constexpr size_t kScores = 1;
  static constexpr size_t kWrites = 1;
  static constexpr size_t kUpdates = 1;
};

struct Item {
  int64_t n = 0;
  int64_t key_head = 0;
  int64_t head = 0;       // first value head
  int64_t num_heads = 0;  // value heads, all of one key head
  int64_t v_begin = 0;
  int64_t num_panels = 0;  // of V
  int64_t begin = 0;       // tokens
  int64_t end = 0;
};

// Decays of one value head in a chunk. b is the cumulated gate, kept in two floats: near the chunk's end differences of
// neighbours would lose to its rounding.
template <class M>
struct Gates {
  HWY_ALIGN float b[M::kChunk];
  HWY_ALIGN float b_low[M::kChunk];
  HWY_ALIGN float beta[M::kChunk];
  HWY_ALIGN float k_from_state[M::kChunk];   // exp(b_i) |k_i|^-1
  HWY_ALIGN float q_from_state[M::kChunk];   // scale exp(b_i) |q_i|^-1
  HWY_ALIGN float to_state[M::kChunk];       // exp(b_C - b_i) |k_i|^-1
  HWY_ALIGN float system_row[2][M::kChunk];  // -beta_i |k_i|^-1; [0]: times exp(b_i - b_r), r the last token before i's
  HWY_ALIGN float score_row[2][M::kChunk];   // scale |q_i|^-1         block; [1]: as it is
  HWY_ALIGN float column[M::kBlocks][M::kChunk];  // [block] exp(b_r - b_j) |k_j|^-1, r the last token before the block
  float whole = 0;                                // exp(b_C), or exp(b_C) - 1 where is_near
  bool is_near = false;
};

template <class M>
struct Work {
  using Element = typename M::Element;
  size_t K;
  size_t depth;    // K, padded for the products
  float* S;        // [heads][panels][K, 16]
  float* rest;     // as S: what the last step rounded away
  bool* has_rest;  // [heads]
  float* kk;       // [C / 16][C, 16]  panels of K K^T, lower triangle
  float* qk;       // [C / 16][C, 16]  panels of Q K^T
  float* A;        // [C, C]           minus the system's strictly lower part
  float* T;        // [C / 16][C, 16]  panels of the system's inverse
  float* below;    // [C / 16 - 1][16, 16]
  // Of a group, by strips [2][2][C / 2, 16]:
  float* R;            // K S^T, then R, then U: each takes the place of the one before
  float* o_state;      // Q S^T
  float* o_chunk;      // tril(D Q K^T) U
  float* change;       // [2][2][C / 2, 16]  of S, two strips of K
  float* rows;         // [C, 32]            of v or out where they are not bf16
  Element* k_rows;     // [C, depth]
  Element* q_rows;     // [C, depth]
  Element* k_panels;   // [C / 16][depth, 16]  K^T
  Element* k_columns;  // [K, C]               K^T
  Element* inverse;    // [C, C]               T - I
  Element* scores;     // [C, C]
  Element* state;      // [heads][panels][depth, 16]
  Element* errors;     // [2][C, 16]           R
  Element* writes;     // [2][C, 16]           U
  Element* updates;    // [2][C, 16]           exp(b_C - b) U
  HWY_ALIGN float k_scale[M::kChunk];
  HWY_ALIGN float q_scale[M::kChunk];
  Gates<M> gates;
  size_t state_part;  // elements from part to part of state
  const BFloat16Products* products;

  size_t keys_size() const { return M::kChunk * depth; }
};

HWY_INLINE void run(const Work<BFloat16Mode>& w, const Product<uint16_t>& p) {
  w.products->multiply(p);
}
HWY_INLINE void run(const Work<Float32Mode>&, const Product<float>& p) {
  multiply(p);
}

// e^x for x <= 0, zero below kSmallestLog.
HWY_INLINE VF exp_decay(F32 d, VF x) {
  const auto is_zero = hn::Lt(x, hn::Set(d, kSmallestLog));
  const VF clamped = hn::IfThenElse(is_zero, hn::Set(d, kSmallestLog), x);
  VF p, n;
  split_exp(d, clamped, p, n);
  return hn::IfThenZeroElse(is_zero, multiply_by_power(d, p, n));
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CHUNK_WORK_INL_H_
