// SPDX-License-Identifier: Apache-2.0
// Gated delta rule in chunks of C = 64 tokens: chunk_gated_delta_rule. With b = cumsum g inside the chunk and
// D_ij = exp(b_i - b_j), i >= j, for rows i of K, Q, V, R, U, O in the chunk:
//
//   R = V - exp(b) (K S^T)                                what the old state gets wrong
//   U = (I + tril(beta D K K^T, -1))^-1 (beta R)          what is written
//   O = scale (exp(b) (Q S^T) + tril(D Q K^T) U)
//   S <- exp(b_C) S + (exp(b_C - b) U)^T K
//
// Loop: sequence and some value heads (a work item) -> chunk -> key head: K K^T, Q K^T -> value head: D, the inverse ->
// 32 columns of V: everything else. S^T [K, V] and every matrix with columns in V lie in panels of 16 columns. A short
// last chunk is padded with tokens that change nothing (k = q = beta = g = 0).
//
// l2norm: the products take k and q as they come; the norms, f32, are folded into the rows of D, R and U.
// Decays: b is summed in f64 and kept in two floats. No exp has a positive argument: off the diagonal blocks of
// 16 x 16, D_ij = exp(b_i - b_r) exp(b_r - b_j) with a token r between them.
//
// Rounding, f32 (exact): everything is f32, the state too, which is rounded to its own type after the last token. Where
// exp(b_C) > 0.6 the state's step is S + (S expm1(b_C) + U^T K), rounded once.
// Rounding, bf16 products (fast): sums, gates, norms, the inverse and the state are f32 as above. k and q are rounded
// to bf16 (exact if they are bf16). Every other operand is a sum of two bf16 numbers, which hold 16 bits: S, the
// inverse below its diagonal, R, tril(D Q K^T), U and exp(b_C - b) U. One bf16 does for none of them, because what
// errors do depends on the keys: where they are alike, U is made of differences of neighbouring rows of R, whose sum
// keeps every error of R (S off by 1e-2), o of differences of S q and tril(D Q K^T) U; where they span all of K and
// nothing decays, errors of S k return in every chunk.
//
// Order of sums: each element of a product is summed in ascending depth by one accumulator (packed_product.h), whatever
// is computed beside it. So a call's bits depend on the instruction set and the accuracy alone: not on threads, on
// other sequences, on the split of V, nor on a split of the prompt at multiples of 64 (with an f32 state).
#include "core/kernels/cpu/chunk_gated_delta_rule.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/chunk_gated_delta_rule.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/packed_product-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kChunk = 64;
constexpr size_t kBlock = 16;  // tokens: the decay's and the solve's blocks
constexpr size_t kBlocks = kChunk / kBlock;
constexpr size_t kStrip = 32;  // tokens: the granularity of triangular products
constexpr size_t kMaxDim = 256;
constexpr size_t kGroup = 2;               // panels of V that pass through a chunk together
constexpr float kSmallestLog = -86.0f;     // below it a decay is zero: nothing here is subnormal
constexpr float kSmallestGate = -1000.0f;  // of one token; its exp is zero many times over

// How many bf16 parts stand for a value in each operand (see "Rounding").
struct BFloat16Mode {
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

struct Float32Mode {
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

// ---- one work item --------------------------------------------------------------------------------------------------

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
struct Gates {
  HWY_ALIGN float b[kChunk];
  HWY_ALIGN float b_low[kChunk];
  HWY_ALIGN float beta[kChunk];
  HWY_ALIGN float k_from_state[kChunk];     // exp(b_i) |k_i|^-1
  HWY_ALIGN float q_from_state[kChunk];     // scale exp(b_i) |q_i|^-1
  HWY_ALIGN float to_state[kChunk];         // exp(b_C - b_i) |k_i|^-1
  HWY_ALIGN float system_row[2][kChunk];    // -beta_i |k_i|^-1; [0]: times exp(b_i - b_r), r the last token before i's
  HWY_ALIGN float score_row[2][kChunk];     // scale |q_i|^-1         block; [1]: as it is
  HWY_ALIGN float column[kBlocks][kChunk];  // [block] exp(b_r - b_j) |k_j|^-1, r the last token before the block
  float whole = 0;                          // exp(b_C), or exp(b_C) - 1 where is_near
  bool is_near = false;
};

template <class M>
struct Work {
  using Element = typename M::Element;
  size_t K;
  size_t depth;  // K, padded for the products
  float* S;      // [heads][panels][K, 16]
  float* kk;     // [4][64, 16]    panels of K K^T, lower triangle
  float* qk;     // [4][64, 16]    panels of Q K^T
  float* A;      // [64, 64]       minus the system's strictly lower part
  float* T;      // [4][64, 16]    panels of the system's inverse
  float* below;  // [3][16, 16]
  // Of a group, by strips [2][2][32, 16]:
  float* x;            // K S^T, then R, then U
  float* y;            // Q S^T
  float* z;            // tril(D Q K^T) U
  float* change;       // [2][2][32, 16]  of S, two strips of K
  float* rows;         // [64, 32]        of v or out where they are not bf16
  Element* k_rows;     // [64, depth]
  Element* q_rows;     // [64, depth]
  Element* k_panels;   // [4][depth, 16]    K^T
  Element* k_columns;  // [K, 64]           K^T
  Element* inverse;    // [64, 64]          T - I
  Element* scores;     // [64, 64]
  Element* state;      // [heads][panels][depth, 16]
  Element* errors;     // [2][64, 16]       R
  Element* writes;     // [2][64, 16]       U
  Element* updates;    // [2][64, 16]       exp(b_C - b) U
  HWY_ALIGN float k_scale[kChunk];
  HWY_ALIGN float q_scale[kChunk];
  Gates gates;
  size_t state_part;  // elements from part to part of state
  const BFloat16Products* products;

  size_t keys_size() const { return kChunk * depth; }
};

constexpr size_t kSquare = kChunk * kChunk;
constexpr size_t kGroupSize = kGroup * kChunk * kPanel;

HWY_INLINE void run(const Work<BFloat16Mode>& w, const Product<uint16_t>& p) {
  w.products->multiply(p);
}
HWY_INLINE void run(const Work<Float32Mode>&, const Product<float>& p) {
  multiply(p);
}

// e^x for x <= 0, zero below kSmallestLog.
HWY_INLINE VF exp_decay(F32 d, VF x) {
  const I32 i;
  const auto is_zero = hn::Lt(x, hn::Set(d, kSmallestLog));
  const VF clamped = hn::IfThenElse(is_zero, hn::Set(d, kSmallestLog), x);
  VF p, n;
  split_exp(d, clamped, p, n);
  const VF power = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(i, n), hn::Set(i, 127))));
  return hn::IfThenZeroElse(is_zero, hn::Mul(p, power));
}

// ---- keys: once per key head and chunk ------------------------------------------------------------------------------

template <size_t kParts, class Element>
HWY_INLINE void stage_row(DType dtype, const void* from, size_t K, Element* to, size_t part_stride) {
  const F32 d;
  if (kParts == 1 && dtype == DType::kBFloat16 && std::is_same_v<Element, uint16_t>) {
    for (size_t i = 0; i < K; i += hn::Lanes(d)) {
      hn::StoreU(hn::LoadU(U16(), static_cast<const uint16_t*>(from) + i), U16(), reinterpret_cast<uint16_t*>(to) + i);
    }
    return;
  }
  HWY_ALIGN float row[kMaxDim];
  load_row(dtype, from, K, row);
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    store_lanes<kParts>(d, hn::Load(d, row + i), to + i, part_stride);
  }
}

template <class M>
void stage_rows(const InRows& from, int64_t key_head, int64_t token, size_t count, const Work<M>& w,
                typename M::Element* to) {
  for (size_t t = 0; t < count; ++t) {
    stage_row<M::kKeys>(from.dtype, from.at(token + t, key_head), w.K, to + t * w.depth, w.keys_size());
  }
  for (size_t part = 0; part < M::kKeys; ++part) {
    std::fill(to + part * w.keys_size() + count * w.depth, to + (part + 1) * w.keys_size(), typename M::Element{0});
  }
}

HWY_INLINE VF load_elements(F32 d, const uint16_t* from) {
  return load(d, from);
}
HWY_INLINE VF load_elements(F32 d, const float* from) {
  return hn::Load(d, from);
}

// |k|^-1 from the diagonal of K K^T, |q|^-1 from the rows.
template <class M>
void find_scales(bool normalise, Work<M>& w) {
  const F32 d;
  for (size_t t = 0; t < kChunk; ++t) {
    w.k_scale[t] = w.kk[t / kPanel * kChunk * kPanel + t * kPanel + t % kPanel];
    VF sum = hn::Zero(d);
    for (size_t i = 0; i < w.K; i += hn::Lanes(d)) {
      const VF x = load_elements(d, w.q_rows + t * w.depth + i);
      sum = hn::MulAdd(x, x, sum);
    }
    w.q_scale[t] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
  const VF one = hn::Set(d, 1.0f), eps = hn::Set(d, kNormEps);
  for (size_t t = 0; t < kChunk; t += hn::Lanes(d)) {
    for (float* scale : {w.k_scale + t, w.q_scale + t}) {
      const VF inverse = normalise ? hn::Div(one, hn::Sqrt(hn::Add(hn::Load(d, scale), eps))) : one;
      hn::Store(inverse, d, scale);
    }
  }
}

// K^T as rows of A, from its panels.
void split_columns(const Work<BFloat16Mode>& w) {
  const U32 u;
  const uint32_t* panels = reinterpret_cast<const uint32_t*>(w.k_panels);
  for (size_t i = 0; i < w.K / 2; ++i) {
    for (size_t t = 0; t < kChunk; t += hn::Lanes(u)) {
      const auto words = hn::LoadU(u, panels + (t / kPanel * (w.depth / 2) + i) * kPanel + t % kPanel);
      uint16_t* to = w.k_columns + 2 * i * kChunk + t;
      store_low_halves(hn::And(words, hn::Set(u, 0xFFFF)), to);
      store_low_halves(hn::ShiftRight<16>(words), to + kChunk);
    }
  }
}

void split_columns(const Work<Float32Mode>& w) {
  for (size_t i = 0; i < w.K; ++i) {
    for (size_t t = 0; t < kChunk; t += kPanel) {
      std::memcpy(w.k_columns + i * kChunk + t, w.k_panels + (t / kPanel * w.depth + i) * kPanel,
                  kPanel * sizeof(float));
    }
  }
}

template <class M>
void multiply_keys(const Work<M>& w, const typename M::Element* rows, float* c) {
  Product<typename M::Element> p;
  p.rows = kStrip;
  p.a_stride = w.depth;
  p.b_stride = w.depth * kPanel;
  p.c_stride = kChunk * kPanel;
  for (size_t token = 0; token < kChunk; token += kStrip) {
    set_terms<M::kKeys, M::kKeys>(p, w.depth, rows + token * w.depth, w.keys_size(), w.k_panels, w.keys_size());
    p.panels = (token + kStrip) / kPanel;
    p.c = c + token * kPanel;
    run(w, p);
  }
}

template <class M>
void stage_keys(const ChunkGatedDeltaRuleArgs& args, int64_t key_head, int64_t token, size_t count, Work<M>& w) {
  constexpr size_t kElementsPerWord = sizeof(uint32_t) / sizeof(typename M::Element);
  stage_rows(args.k, key_head, token, count, w, w.k_rows);
  stage_rows(args.q, key_head, token, count, w, w.q_rows);
  const size_t words = w.depth / kElementsPerWord;
  for (size_t part = 0; part < M::kKeys; ++part) {
    for (size_t t = 0; t < kChunk; t += kPanel) {
      transpose(w.k_rows + part * w.keys_size() + t * w.depth, kPanel, words, words,
                w.k_panels + part * w.keys_size() + t * w.depth, kPanel);
    }
  }
  split_columns(w);
  multiply_keys(w, w.k_rows, w.kk);
  multiply_keys(w, w.q_rows, w.qk);
  find_scales(args.normalise_qk, w);
}

// ---- gates, scores and the system: once per value head and chunk
// ------------------------------------------------------

template <class M>
void stage_gates(const ChunkGatedDeltaRuleArgs& args, int64_t head, int64_t token, size_t count, Work<M>& w) {
  const F32 d;
  Gates& gates = w.gates;
  double sum = 0;
  for (size_t t = 0; t < kChunk; ++t) {
    gates.beta[t] = 0;
    if (t < count) {
      const float g = load_scalar(args.g.dtype, args.g.at(token + t, head));
      sum += g < kSmallestGate ? kSmallestGate : g;
      gates.beta[t] = load_scalar(args.beta.dtype, args.beta.at(token + t, head));
    }
    gates.b[t] = static_cast<float>(sum);
    gates.b_low[t] = static_cast<float>(sum - gates.b[t]);
  }
  gates.is_near = sum > kNearOne;
  gates.whole = static_cast<float>(gates.is_near ? std::expm1(sum) : sum < kSmallestLog ? 0.0 : std::exp(sum));

  const auto difference = [&](size_t i, VF b, VF b_low) HWY_ATTR {
    return hn::Add(hn::Sub(hn::Set(d, gates.b[i]), b), hn::Sub(hn::Set(d, gates.b_low[i]), b_low));
  };
  for (size_t t = 0; t < kChunk; t += hn::Lanes(d)) {
    const VF b = hn::Load(d, gates.b + t);
    const VF b_low = hn::Load(d, gates.b_low + t);
    const VF k_scale = hn::Load(d, w.k_scale + t);
    const VF system = hn::Neg(hn::Mul(hn::Load(d, gates.beta + t), k_scale));
    const VF score = hn::Mul(hn::Set(d, args.scale), hn::Load(d, w.q_scale + t));
    const VF from_state = exp_decay(d, b);
    hn::Store(hn::Mul(from_state, k_scale), d, gates.k_from_state + t);
    hn::Store(hn::Mul(from_state, score), d, gates.q_from_state + t);
    hn::Store(hn::Mul(exp_decay(d, difference(kChunk - 1, b, b_low)), k_scale), d, gates.to_state + t);
    hn::Store(system, d, gates.system_row[1] + t);
    hn::Store(score, d, gates.score_row[1] + t);
    if (t >= kBlock) {
      const VF decay = exp_decay(d, hn::Neg(difference(t / kBlock * kBlock - 1, b, b_low)));
      hn::Store(hn::Mul(system, decay), d, gates.system_row[0] + t);
      hn::Store(hn::Mul(score, decay), d, gates.score_row[0] + t);
    }
    for (size_t block = t / kBlock + 1; block < kBlocks; ++block) {
      const VF decay = exp_decay(d, difference(block * kBlock - 1, b, b_low));
      hn::Store(hn::Mul(decay, k_scale), d, gates.column[block] + t);
    }
  }
}

// One block of 16 x 16 of A and of the scores.
template <bool kIsDiagonal, class M>
HWY_INLINE void weigh_block(size_t row, size_t column, const Work<M>& w) {
  const F32 d;
  const Gates& gates = w.gates;
  for (size_t lane = 0; lane < kBlock; lane += hn::Lanes(d)) {
    const size_t j = column + lane;
    const VF b = hn::Load(d, gates.b + j);
    const VF b_low = hn::Load(d, gates.b_low + j);
    const VF k_scale = hn::Load(d, w.k_scale + j);
    const VF lanes = hn::Iota(d, static_cast<float>(lane));
    for (size_t r = 0; r < kBlock; ++r) {
      const size_t i = row + r;
      const size_t at = column * kChunk + i * kPanel + lane;  // in a panel
      VF decay = hn::Zero(d);
      if constexpr (kIsDiagonal) {
        const VF log = hn::Add(hn::Sub(hn::Set(d, gates.b[i]), b), hn::Sub(hn::Set(d, gates.b_low[i]), b_low));
        decay = hn::Mul(exp_decay(d, log), k_scale);
      } else {
        decay = hn::Load(d, gates.column[row / kBlock] + j);
      }
      VF a = hn::Mul(hn::Mul(hn::Set(d, gates.system_row[kIsDiagonal][i]), decay), hn::Load(d, w.kk + at));
      VF p = hn::Mul(hn::Mul(hn::Set(d, gates.score_row[kIsDiagonal][i]), decay), hn::Load(d, w.qk + at));
      if constexpr (kIsDiagonal) {
        const VF diagonal = hn::Set(d, static_cast<float>(r));
        a = hn::IfThenElseZero(hn::Lt(lanes, diagonal), a);
        p = hn::IfThenElseZero(hn::Le(lanes, diagonal), p);
      }
      hn::Store(a, d, w.A + i * kChunk + j);
      store_lanes<M::kScores>(d, p, w.scores + i * kChunk + j, kSquare);
    }
  }
}

// T = (I - A)^-1 by blocks: the four on the diagonal by substitution, below them T_IJ = T_II sum_M A_IM T_MJ.
template <class M>
void invert(size_t rows, const Work<M>& w) {
  const F32 d;
  constexpr size_t kNext = kBlock * kChunk + kBlock;                // in A, from diagonal block to diagonal block
  constexpr size_t kNextPanel = kChunk * kPanel + kBlock * kPanel;  // in T
  for (size_t lane = 0; lane < kBlock; lane += hn::Lanes(d)) {
    const VF lanes = hn::Iota(d, static_cast<float>(lane));
    for (size_t i = 0; i < kBlock; ++i) {
      const VF unit = hn::IfThenElseZero(hn::Eq(lanes, hn::Set(d, static_cast<float>(i))), hn::Set(d, 1.0f));
      VF t0 = unit, t1 = unit, t2 = unit, t3 = unit;
      const float* a = w.A + i * kChunk;
      const float* t = w.T + lane;
      for (size_t j = 0; j < i; ++j) {
        t0 = hn::MulAdd(hn::Set(d, a[j]), hn::Load(d, t + j * kPanel), t0);
        t1 = hn::MulAdd(hn::Set(d, a[j + kNext]), hn::Load(d, t + j * kPanel + kNextPanel), t1);
        t2 = hn::MulAdd(hn::Set(d, a[j + 2 * kNext]), hn::Load(d, t + j * kPanel + 2 * kNextPanel), t2);
        t3 = hn::MulAdd(hn::Set(d, a[j + 3 * kNext]), hn::Load(d, t + j * kPanel + 3 * kNextPanel), t3);
      }
      float* to = w.T + i * kPanel + lane;
      hn::Store(t0, d, to);
      hn::Store(t1, d, to + kNextPanel);
      hn::Store(t2, d, to + 2 * kNextPanel);
      hn::Store(t3, d, to + 3 * kNextPanel);
    }
  }
  Product<float> p;
  p.num_terms = 1;
  p.rows = kBlock;
  for (size_t row = kBlock; row < rows; row += kBlock) {
    p.panels = row / kBlock;
    p.a_stride = kChunk;
    p.b_stride = kChunk * kPanel;
    p.terms[0] = {w.A + row * kChunk, w.T, row};
    p.c = w.below;
    p.c_stride = kBlock * kPanel;
    multiply(p);
    p.a_stride = kPanel;
    p.b_stride = kBlock * kPanel;
    p.terms[0] = {w.T + row * kChunk + row * kPanel, w.below, kBlock};
    p.c = w.T + row * kPanel;
    p.c_stride = kChunk * kPanel;
    multiply(p);
  }
}

// T - I as rows of A.
template <class M>
void pack_inverse(size_t rows, const Work<M>& w) {
  const F32 d;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j <= i; j += hn::Lanes(d)) {
      const VF t = hn::Load(d, w.T + j / kPanel * kChunk * kPanel + i * kPanel + j % kPanel);
      const auto below = hn::Lt(hn::Iota(d, static_cast<float>(j)), hn::Set(d, static_cast<float>(i)));
      store_lanes<M::kInverse>(d, hn::IfThenElseZero(below, t), w.inverse + i * kChunk + j, kSquare);
    }
  }
}

template <class M>
void stage_head(const ChunkGatedDeltaRuleArgs& args, int64_t head, int64_t token, size_t count, size_t rows,
                Work<M>& w) {
  stage_gates(args, head, token, count, w);
  for (size_t row = 0; row < kChunk; row += kBlock) {
    for (size_t column = 0; column < row; column += kBlock) weigh_block<false>(row, column, w);
    weigh_block<true>(row, row, w);
  }
  invert(rows, w);
  pack_inverse(rows, w);
}

// ---- a group of panels through a chunk ------------------------------------------------------------------------------

// What a group of panels works on.
struct Group {
  int64_t head = 0;
  int64_t v_begin = 0;
  int64_t token = 0;
  size_t count = 0;  // tokens
  size_t rows = 0;   // tokens, padded
  size_t panels = 0;
};

// c (+)= rows [row, row + 32) of K or Q times S^T.
template <class M>
void multiply_state(const Work<M>& w, const Group& group, const typename M::Element* rows,
                    const typename M::Element* state, size_t row, float* c) {
  Product<typename M::Element> p;
  p.rows = kStrip;
  p.panels = group.panels;
  p.a_stride = w.depth;
  p.b_stride = w.depth * kPanel;
  p.c = c;
  p.c_stride = kStrip * kPanel;
  set_terms<M::kKeys, M::kState>(p, w.depth, rows + row * w.depth, w.keys_size(), state, w.state_part);
  run(w, p);
}

// c (+)= rows [row, row + 32) of the lower triangle a times b.
template <size_t kAParts, size_t kBParts, class M>
void multiply_lower(const Work<M>& w, const Group& group, const typename M::Element* a, const typename M::Element* b,
                    size_t row, bool accumulate, float* c) {
  Product<typename M::Element> p;
  p.rows = kStrip;
  p.panels = group.panels;
  p.a_stride = kChunk;
  p.b_stride = kChunk * kPanel;
  p.c = c;
  p.c_stride = kStrip * kPanel;
  p.accumulate = accumulate;
  set_terms<kAParts, kBParts>(p, row + kStrip, a + row * kChunk, kSquare, b, kGroupSize);
  run(w, p);
}

// Rows of v as they lie, or staged.
template <class V>
struct ValueRows {
  const V* first = nullptr;
  int64_t stride = 0;
};

// x <- beta (v - exp(b) x), packed as well.
template <class M, class V>
void form_errors(const Group& group, size_t row, ValueRows<V> v, float* HWY_RESTRICT x, const Work<M>& w) {
  const F32 d;
  const Gates& gates = w.gates;
  for (size_t t = 0; t < kStrip; t += 2) {
    const size_t token = row + t;
    const VF beta0 = hn::Set(d, gates.beta[token]), beta1 = hn::Set(d, gates.beta[token + 1]);
    const VF decay0 = hn::Set(d, gates.k_from_state[token]), decay1 = hn::Set(d, gates.k_from_state[token + 1]);
    const V* from = v.first + token * v.stride;
    for (size_t panel = 0; panel < group.panels; ++panel, from += kPanel) {
      float* c = x + (panel * kStrip + t) * kPanel;
      auto* to = w.errors + panel * kChunk * kPanel;
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const VF v0 = token < group.count ? load(d, from + lane) : hn::Zero(d);
        const VF v1 = token + 1 < group.count ? load(d, from + v.stride + lane) : hn::Zero(d);
        const VF x0 = hn::Mul(beta0, hn::NegMulAdd(decay0, hn::Load(d, c + lane), v0));
        const VF x1 = hn::Mul(beta1, hn::NegMulAdd(decay1, hn::Load(d, c + kPanel + lane), v1));
        hn::Store(x0, d, c + lane);
        hn::Store(x1, d, c + kPanel + lane);
        store_pair<M::kErrors>(d, x0, x1, pair_at(to, token / 2, lane), kGroupSize);
      }
    }
  }
}

// U for the outputs and, decayed to the chunk's end, for the state.
template <class M>
void pack_writes(const Group& group, size_t row, const float* HWY_RESTRICT x, const Work<M>& w) {
  const F32 d;
  for (size_t panel = 0; panel < group.panels; ++panel) {
    auto* writes = w.writes + panel * kChunk * kPanel;
    auto* updates = w.updates + panel * kChunk * kPanel;
    for (size_t t = 0; t < kStrip; t += 2) {
      const size_t token = row + t;
      const VF decay0 = hn::Set(d, w.gates.to_state[token]), decay1 = hn::Set(d, w.gates.to_state[token + 1]);
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const float* u = x + (panel * kStrip + t) * kPanel + lane;
        const VF u0 = hn::Load(d, u), u1 = hn::Load(d, u + kPanel);
        store_pair<M::kWrites>(d, u0, u1, pair_at(writes, token / 2, lane), kGroupSize);
        store_pair<M::kUpdates>(d, hn::Mul(u0, decay0), hn::Mul(u1, decay1), pair_at(updates, token / 2, lane),
                                kGroupSize);
      }
    }
  }
}

// o = scale exp(b) Q S^T + tril(D Q K^T) U
template <class M, class O>
void write_outputs(const Group& group, size_t row, const float* HWY_RESTRICT y, const float* HWY_RESTRICT z, O* out,
                   int64_t stride, const Work<M>& w) {
  const F32 d;
  const size_t last = std::min(kStrip, group.count - row);
  for (size_t t = 0; t < last; ++t) {
    const VF decay = hn::Set(d, w.gates.q_from_state[row + t]);
    for (size_t panel = 0; panel < group.panels; ++panel) {
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const size_t at = (panel * kStrip + t) * kPanel + lane;
        store(d, hn::MulAdd(hn::Load(d, y + at), decay, hn::Load(d, z + at)),
              out + (row + t) * stride + panel * kPanel + lane);
      }
    }
  }
}

template <bool kIsNear>
HWY_INLINE VF decayed(VF x, VF factor, VF change) {
  if constexpr (kIsNear) {
    return hn::Add(x, hn::MulAdd(x, factor, change));
  } else {
    return hn::MulAdd(x, factor, change);
  }
}

// S <- exp(b_C) S + change for `rows` rows of K, packed as well.
template <bool kIsNear, class M>
void advance_state(size_t rows, float whole, const float* HWY_RESTRICT change, float* HWY_RESTRICT S,
                   typename M::Element* state, size_t state_part) {
  const F32 d;
  const VF factor = hn::Set(d, whole);
  for (size_t i = 0; i < rows; i += 2) {
    for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
      const size_t at = i * kPanel + lane;
      const VF even = decayed<kIsNear>(hn::Load(d, S + at), factor, hn::Load(d, change + at));
      const VF odd = decayed<kIsNear>(hn::Load(d, S + at + kPanel), factor, hn::Load(d, change + at + kPanel));
      hn::Store(even, d, S + at);
      hn::Store(odd, d, S + at + kPanel);
      if constexpr (!std::is_same_v<typename M::Element, float>) {
        store_pair<M::kState>(d, even, odd, pair_at(state, i / 2, lane), state_part);
      }
    }
  }
}

// c = rows [row, row + 32) of K^T times exp(b_C - b) U
template <class M>
void multiply_updates(const Work<M>& w, const Group& group, size_t row, float* c) {
  Product<typename M::Element> p;
  p.rows = std::min(kStrip, w.K - row);
  p.panels = group.panels;
  p.a_stride = kChunk;
  p.b_stride = kChunk * kPanel;
  p.c = c;
  p.c_stride = kStrip * kPanel;
  set_terms<M::kKeys, M::kUpdates>(p, group.rows, w.k_columns + row * kChunk, w.K * kChunk, w.updates, kGroupSize);
  run(w, p);
}

template <class M>
void advance_group(const Work<M>& w, const Group& group, size_t row, const float* change, float* S,
                   typename M::Element* state) {
  const size_t rows = std::min(kStrip, w.K - row);
  const Gates& gates = w.gates;
  for (size_t panel = 0; panel < group.panels; ++panel) {
    float* at = S + (panel * w.K + row) * kPanel;
    auto* packed = state + (panel * w.depth + row) * kPanel;
    const float* c = change + panel * kStrip * kPanel;
    if (gates.is_near) {
      advance_state<true, M>(rows, gates.whole, c, at, packed, w.state_part);
    } else {
      advance_state<false, M>(rows, gates.whole, c, at, packed, w.state_part);
    }
  }
}

template <class M>
void form_errors(const ChunkGatedDeltaRuleArgs& args, const Group& group, size_t row, float* x, const Work<M>& w) {
  if (args.v.dtype == DType::kBFloat16) {
    const uint16_t* first = static_cast<const uint16_t*>(args.v.at(group.token, group.head)) + group.v_begin;
    form_errors(group, row, ValueRows<uint16_t>{first, args.v.token_stride}, x, w);
    return;
  }
  const size_t last = std::min(kStrip, group.count - std::min(row, group.count));
  for (size_t t = row; t < row + last; ++t) {
    const char* from = static_cast<const char*>(args.v.at(group.token + t, group.head));
    load_row(args.v.dtype, from + group.v_begin * size_of(args.v.dtype), group.panels * kPanel,
             w.rows + t * kGroup * kPanel);
  }
  form_errors(group, row, ValueRows<float>{w.rows, kGroup * kPanel}, x, w);
}

template <class M>
void write_outputs(const ChunkGatedDeltaRuleArgs& args, const Group& group, size_t row, const float* y, const float* z,
                   const Work<M>& w) {
  if (row >= group.count) return;
  if (args.out.dtype == DType::kBFloat16) {
    uint16_t* first = static_cast<uint16_t*>(args.out.at(group.token, group.head)) + group.v_begin;
    write_outputs(group, row, y, z, first, args.out.token_stride, w);
    return;
  }
  write_outputs(group, row, y, z, w.rows, kGroup * kPanel, w);
  for (size_t t = row; t < std::min(row + kStrip, group.count); ++t) {
    char* to = static_cast<char*>(args.out.at(group.token + t, group.head));
    store_row(args.out.dtype, w.rows + t * kGroup * kPanel, group.panels * kPanel,
              to + group.v_begin * size_of(args.out.dtype));
  }
}

// The group's tokens. A product is started before the sweep over the one before it: tiles and vectors work at once.
template <class M>
void step_group(const ChunkGatedDeltaRuleArgs& args, const Group& group, float* S, typename M::Element* state,
                const Work<M>& w) {
  const typename M::Element* packed = state;
  if constexpr (std::is_same_v<typename M::Element, float>) packed = S;
  for (size_t row = 0; row < group.rows; row += kStrip) {
    multiply_state(w, group, w.k_rows, packed, row, w.x + row * kGroup * kPanel);
  }
  for (size_t row = 0; row < group.rows; row += kStrip) {
    multiply_state(w, group, w.q_rows, packed, row, w.y + row * kGroup * kPanel);
    form_errors(args, group, row, w.x + row * kGroup * kPanel, w);
  }
  for (size_t row = 0; row < group.rows; row += kStrip) {
    float* x = w.x + row * kGroup * kPanel;
    multiply_lower<M::kInverse, M::kErrors>(w, group, w.inverse, w.errors, row, true, x);
  }
  for (size_t row = 0; row < group.rows; row += kStrip) {
    pack_writes(group, row, w.x + row * kGroup * kPanel, w);
    multiply_lower<M::kScores, M::kWrites>(w, group, w.scores, w.writes, row, false, w.z + row * kGroup * kPanel);
  }
  const auto change = [&](size_t row) { return w.change + row / kStrip % 2 * kGroup * kStrip * kPanel; };
  multiply_updates(w, group, 0, change(0));
  for (size_t row = 0; row < group.rows; row += kStrip) {
    write_outputs(args, group, row, w.y + row * kGroup * kPanel, w.z + row * kGroup * kPanel, w);
  }
  for (size_t row = 0; row < w.K; row += kStrip) {
    if (row + kStrip < w.K) multiply_updates(w, group, row + kStrip, change(row + kStrip));
    advance_group(w, group, row, change(row), S, state);
  }
}

// ---- states ---------------------------------------------------------------------------------------------------------

template <typename State>
State* pool_rows(const ChunkGatedDeltaRuleArgs& args, const Item& item, int32_t slot, int64_t head) {
  return static_cast<State*>(args.state) + slot * args.slot_stride + (head * args.V + item.v_begin) * args.K;
}

// A NaN of the pool becomes the plain one, which survives every rounding.
void plain_nans(float* S, size_t size) {
  const F32 d;
  for (size_t i = 0; i < size; i += hn::Lanes(d)) {
    const VF x = hn::Load(d, S + i);
    hn::Store(hn::IfThenElse(hn::IsNaN(x), hn::NaN(d), x), d, S + i);
  }
}

template <typename State>
void read_state(const State* from, size_t panels, size_t K, float* S) {
  HWY_ALIGN float rows[kPanel * kMaxDim];
  for (size_t panel = 0; panel < panels; ++panel, from += kPanel * K) {
    const F32 d;
    for (size_t i = 0; i < kPanel * K; i += hn::Lanes(d)) hn::Store(load(d, from + i), d, rows + i);
    plain_nans(rows, kPanel * K);
    transpose(rows, kPanel, K, K, S + panel * K * kPanel, kPanel);
  }
}

template <typename State>
void write_state(const float* S, size_t panels, size_t K, State* to) {
  const F32 d;
  HWY_ALIGN float rows[kPanel * kMaxDim];
  for (size_t panel = 0; panel < panels; ++panel, to += kPanel * K) {
    transpose(S + panel * K * kPanel, K, kPanel, kPanel, rows, K);
    for (size_t i = 0; i < kPanel * K; i += hn::Lanes(d)) store(d, hn::Load(d, rows + i), to + i);
  }
}

// The states as operands of the first chunk.
void pack_states(const Item& item, const Work<BFloat16Mode>& w) {
  const F32 d;
  for (int64_t panel = 0; panel < item.num_heads * item.num_panels; ++panel) {
    const float* S = w.S + panel * w.K * kPanel;
    uint16_t* state = w.state + panel * w.depth * kPanel;
    for (size_t i = 0; i < w.K; i += 2) {
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const VF even = hn::Load(d, S + i * kPanel + lane), odd = hn::Load(d, S + (i + 1) * kPanel + lane);
        store_pair<BFloat16Mode::kState>(d, even, odd, pair_at(state, i / 2, lane), w.state_part);
      }
    }
  }
}
void pack_states(const Item&, const Work<Float32Mode>&) {}

// ---- reading ahead --------------------------------------------------------------------------------------------------

// Columns [begin, begin + size) of tokens of a head. kIsWritten: 1 for rows that are written next, else 0.
template <int kIsWritten, class Rows>
void prefetch_rows(const Rows& rows, int64_t token, int64_t end, int64_t head, int64_t begin, int64_t size) {
  const int64_t element = size_of(rows.dtype);
  for (; token < end; ++token) {
    prefetch<kIsWritten>(static_cast<const char*>(rows.at(token, head)) + begin * element, size * element);
  }
}

// While group `index` of a chunk's `total` is computed: the values that the next group reads, and its share of the next
// chunk's keys. Tokens lie far apart in memory, where no hardware prefetcher follows; all of their rows at once would
// fall into the same few sets of the cache.
void prefetch_next(const ChunkGatedDeltaRuleArgs& args, const Item& item, int64_t token, int64_t index, int64_t total) {
  const int64_t next = (index + 1) % total;
  const int64_t groups = total / item.num_heads;
  const int64_t next_token = next > index ? token : token + kChunk;
  const int64_t next_end = std::min<int64_t>(next_token + kChunk, item.end);
  const int64_t column = next % groups * kGroup * kPanel;
  const int64_t size = std::min<int64_t>(kGroup * kPanel, item.num_panels * kPanel - column);
  prefetch_rows<0>(args.v, next_token, next_end, item.head + next / groups, item.v_begin + column, size);
  prefetch_rows<1>(args.out, next_token, next_end, item.head + next / groups, item.v_begin + column, size);
  const int64_t begin = token + kChunk + kChunk * index / total;
  const int64_t end = std::min<int64_t>(token + kChunk + kChunk * (index + 1) / total, item.end);
  prefetch_rows<0>(args.k, begin, end, item.key_head, 0, args.K);
  prefetch_rows<0>(args.q, begin, end, item.key_head, 0, args.K);
}

// ---- the item -------------------------------------------------------------------------------------------------------

// Places the arrays of a work item in this thread's scratch memory. What stays zero in them is zeroed.
template <class M>
void place(const ChunkGatedDeltaRuleArgs& args, const Item& item, Work<M>& w) {
  using Element = typename M::Element;
  w.K = args.K;
  w.depth = (args.K + M::kDepthStep - 1) / M::kDepthStep * M::kDepthStep;
  w.products = args.products;
  w.state_part = std::is_same_v<Element, float> ? 0 : item.num_heads * item.num_panels * w.depth * kPanel;
  const size_t keys = w.keys_size();
  size_t size = 0;
  char* memory = nullptr;
  const auto take = [&](auto*& array, size_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + size);
    size += (count * sizeof(*array) + 63) / 64 * 64;
  };
  const auto take_all = [&] {
    size = 0;
    take(w.kk, kSquare);
    take(w.qk, kSquare);
    take(w.A, kSquare);
    take(w.T, kSquare);
    take(w.below, (kBlocks - 1) * kBlock * kPanel);
    take(w.x, kGroupSize);
    take(w.y, kGroupSize);
    take(w.z, kGroupSize);
    take(w.change, kGroupSize);
    take(w.rows, kGroupSize);
    take(w.k_rows, M::kKeys * keys);
    take(w.q_rows, M::kKeys * keys);
    take(w.k_panels, M::kKeys * keys);
    take(w.k_columns, M::kKeys * w.K * kChunk);
    take(w.inverse, M::kInverse * kSquare);
    take(w.scores, M::kScores * kSquare);
    take(w.state, M::kState * w.state_part);
    take(w.errors, M::kErrors * kGroupSize);
    take(w.writes, M::kWrites * kGroupSize);
    take(w.updates, M::kUpdates * kGroupSize);
  };
  take_all();
  const size_t fixed = size;
  const size_t state = item.num_heads * item.num_panels * w.K * kPanel;
  memory = reinterpret_cast<char*>(scratch<Element>(fixed / sizeof(float) + state));
  take_all();
  std::memset(memory, 0, fixed);
  w.S = reinterpret_cast<float*>(memory + fixed);
}

template <class M, typename State>
void run_sequence(const ChunkGatedDeltaRuleArgs& args, const Item& item) {
  Work<M> w;
  place(args, item, w);
  const size_t panels = item.num_panels;
  const size_t state_size = panels * w.K * kPanel;
  const int64_t groups = (panels + kGroup - 1) / kGroup;
  const bool has_initial_state = args.has_initial_state == nullptr || args.has_initial_state[item.n];
  for (int64_t i = 0; i < item.num_heads; ++i) {
    float* S = w.S + i * state_size;
    if (has_initial_state) {
      read_state(pool_rows<State>(args, item, args.read_slots[item.n], item.head + i), panels, w.K, S);
    } else {
      std::fill_n(S, state_size, 0.0f);
    }
  }
  pack_states(item, w);
  for (int64_t token = item.begin; token < item.end; token += kChunk) {
    const size_t count = std::min<int64_t>(kChunk, item.end - token);
    const size_t rows = (count + kStrip - 1) / kStrip * kStrip;
    stage_keys(args, item.key_head, token, count, w);
    for (int64_t i = 0; i < item.num_heads; ++i) {
      const int64_t head = item.head + i;
      stage_head(args, head, token, count, rows, w);
      for (size_t panel = 0; panel < panels; panel += kGroup) {
        const Group group = {head,  item.v_begin + static_cast<int64_t>(panel * kPanel),
                             token, count,
                             rows,  std::min(kGroup, panels - panel)};
        prefetch_next(args, item, token, i * groups + panel / kGroup, item.num_heads * groups);
        step_group(args, group, w.S + i * state_size + panel * w.K * kPanel,
                   w.state + (i * panels + panel) * w.depth * kPanel, w);
      }
    }
  }
  const int32_t slot = args.write_slots[item.n];
  if (slot < 0) return;
  for (int64_t i = 0; i < item.num_heads; ++i) {
    write_state(w.S + i * state_size, panels, w.K, pool_rows<State>(args, item, slot, item.head + i));
  }
}

void clear_outputs(const ChunkGatedDeltaRuleArgs& args, const Item& item) {
  for (int64_t t = item.begin; t < item.end; ++t) {
    for (int64_t i = 0; i < item.num_heads; ++i) {
      char* to = static_cast<char*>(args.out.at(t, item.head + i)) + item.v_begin * size_of(args.out.dtype);
      std::memset(to, 0, item.num_panels * kPanel * size_of(args.out.dtype));
    }
  }
}

template <class M>
void run_item(const ChunkGatedDeltaRuleArgs& args, const Item& item) {
  if (args.is_state_bfloat16) {
    run_sequence<M, BFloat16Bits>(args, item);
  } else {
    run_sequence<M, float>(args, item);
  }
}

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, int64_t index) {
  const int64_t v_blocks = (args.V + args.v_block - 1) / args.v_block;
  const int64_t groups = args.HV / args.heads_per_item;
  Item item;
  item.n = index / (v_blocks * groups);
  item.head = index / v_blocks % groups * args.heads_per_item;
  item.num_heads = args.heads_per_item;
  item.key_head = item.head / (args.HV / args.H);
  item.v_begin = index % v_blocks * args.v_block;
  item.num_panels = std::min(args.v_block, args.V - item.v_begin) / kPanel;
  item.begin = args.cu_seqlens[item.n];
  item.end = args.cu_seqlens[item.n + 1];
  if (args.read_slots[item.n] < 0) {
    clear_outputs(args, item);
  } else if (args.products == nullptr) {
    run_item<Float32Mode>(args, item);
  } else {
    args.products->begin();
    run_item<BFloat16Mode>(args, item);
    args.products->end();
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(chunk_gated_delta_rule);

int64_t num_work_items(const ChunkGatedDeltaRuleArgs& args) {
  return args.N * (args.HV / args.heads_per_item) * ((args.V + args.v_block - 1) / args.v_block);
}

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, int64_t item) {
  HWY_DYNAMIC_DISPATCH(chunk_gated_delta_rule)(args, item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
