// SPDX-License-Identifier: Apache-2.0
// Once per value head and chunk: the gates, the system I + tril(beta D K K^T, -1), its inverse, and the scores
// tril(D Q K^T). The maths and its rounding: chunk_gated_delta_rule.cpp; FLA: the stage's name in
// flash-linear-attention.
#if defined(XGDN_CORE_KERNELS_CPU_CHUNK_GATES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CHUNK_GATES_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CHUNK_GATES_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CHUNK_GATES_INL_H_
#endif

#include <cmath>

#include "core/kernels/cpu/chunk_work-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// ---- gates (FLA: chunk_local_cumsum) --------------------------------------------------------------------------------

template <class M>
void stage_gates(const ChunkGatedDeltaRuleArgs& args, int64_t head, int64_t token, size_t count, Work<M>& w) {
  const F32 d;
  Gates<M>& gates = w.gates;
  double sum = 0;
  for (size_t t = 0; t < M::kChunk; ++t) {
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
  for (size_t t = 0; t < M::kChunk; t += hn::Lanes(d)) {
    const VF b = hn::Load(d, gates.b + t);
    const VF b_low = hn::Load(d, gates.b_low + t);
    const VF k_scale = hn::Load(d, w.k_scale + t);
    const VF system = hn::Neg(hn::Mul(hn::Load(d, gates.beta + t), k_scale));
    const VF score = hn::Mul(hn::Set(d, args.scale), hn::Load(d, w.q_scale + t));
    const VF from_state = exp_decay(d, b);
    hn::Store(hn::Mul(from_state, k_scale), d, gates.k_from_state + t);
    hn::Store(hn::Mul(from_state, score), d, gates.q_from_state + t);
    hn::Store(hn::Mul(exp_decay(d, difference(M::kChunk - 1, b, b_low)), k_scale), d, gates.to_state + t);
    hn::Store(system, d, gates.system_row[1] + t);
    hn::Store(score, d, gates.score_row[1] + t);
    if (t >= kBlock) {
      const VF decay = exp_decay(d, hn::Neg(difference(t / kBlock * kBlock - 1, b, b_low)));
      hn::Store(hn::Mul(system, decay), d, gates.system_row[0] + t);
      hn::Store(hn::Mul(score, decay), d, gates.score_row[0] + t);
    }
    for (size_t block = t / kBlock + 1; block < M::kBlocks; ++block) {
      const VF decay = exp_decay(d, difference(block * kBlock - 1, b, b_low));
      hn::Store(hn::Mul(decay, k_scale), d, gates.column[block] + t);
    }
  }
}

// ---- the system and the scores (FLA: scaled_dot_kkt, and the scores of fwd_o) ---------------------------------------

// One block of 16 x 16 of A and of the scores.
template <bool kIsDiagonal, class M>
HWY_INLINE void weigh_block(size_t row, size_t column, const Work<M>& w) {
  const F32 d;
  const Gates<M>& gates = w.gates;
  for (size_t lane = 0; lane < kBlock; lane += hn::Lanes(d)) {
    const size_t j = column + lane;
    const VF b = hn::Load(d, gates.b + j);
    const VF b_low = hn::Load(d, gates.b_low + j);
    const VF k_scale = hn::Load(d, w.k_scale + j);
    const VF lanes = hn::Iota(d, static_cast<float>(lane));
    for (size_t r = 0; r < kBlock; ++r) {
      const size_t i = row + r;
      const size_t at = column * M::kChunk + i * kPanel + lane;  // in a panel
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
      hn::Store(a, d, w.A + i * M::kChunk + j);
      store_lanes<M::kScores>(d, p, w.scores + i * M::kChunk + j, M::kSquare);
    }
  }
}

// ---- the inverse (FLA: solve_tril) ----------------------------------------------------------------------------------

// T = (I - A)^-1 by blocks: those on the diagonal by substitution, below them T_IJ = T_II sum_M A_IM T_MJ.
template <class M>
void invert(size_t rows, const Work<M>& w) {
  static_assert(M::kBlocks == 2 || M::kBlocks == 4);
  const F32 d;
  constexpr size_t kNext = kBlock * M::kChunk + kBlock;                // in A, from diagonal block to diagonal block
  constexpr size_t kNextPanel = M::kChunk * kPanel + kBlock * kPanel;  // in T
  for (size_t lane = 0; lane < kBlock; lane += hn::Lanes(d)) {
    const VF lanes = hn::Iota(d, static_cast<float>(lane));
    for (size_t i = 0; i < kBlock; ++i) {
      const VF unit = hn::IfThenElseZero(hn::Eq(lanes, hn::Set(d, static_cast<float>(i))), hn::Set(d, 1.0f));
      VF t0 = unit, t1 = unit, t2 = unit, t3 = unit;
      const float* a = w.A + i * M::kChunk;
      const float* t = w.T + lane;
      for (size_t j = 0; j < i; ++j) {
        t0 = hn::MulAdd(hn::Set(d, a[j]), hn::Load(d, t + j * kPanel), t0);
        t1 = hn::MulAdd(hn::Set(d, a[j + kNext]), hn::Load(d, t + j * kPanel + kNextPanel), t1);
        if constexpr (M::kBlocks == 2) continue;
        t2 = hn::MulAdd(hn::Set(d, a[j + 2 * kNext]), hn::Load(d, t + j * kPanel + 2 * kNextPanel), t2);
        t3 = hn::MulAdd(hn::Set(d, a[j + 3 * kNext]), hn::Load(d, t + j * kPanel + 3 * kNextPanel), t3);
      }
      float* to = w.T + i * kPanel + lane;
      hn::Store(t0, d, to);
      hn::Store(t1, d, to + kNextPanel);
      if constexpr (M::kBlocks == 2) continue;
      hn::Store(t2, d, to + 2 * kNextPanel);
      hn::Store(t3, d, to + 3 * kNextPanel);
    }
  }
  Product<float> p;
  p.num_terms = 1;
  p.rows = kBlock;
  for (size_t row = kBlock; row < rows; row += kBlock) {
    p.panels = row / kBlock;
    p.a_stride = M::kChunk;
    p.b_stride = M::kChunk * kPanel;
    p.terms[0] = {w.A + row * M::kChunk, w.T, row};
    p.c = w.below;
    p.c_stride = kBlock * kPanel;
    multiply(p);
    p.a_stride = kPanel;
    p.b_stride = kBlock * kPanel;
    p.terms[0] = {w.T + row * M::kChunk + row * kPanel, w.below, kBlock};
    p.c = w.T + row * kPanel;
    p.c_stride = M::kChunk * kPanel;
    multiply(p);
  }
}

// T - I as rows of A.
template <class M>
void pack_inverse(size_t rows, const Work<M>& w) {
  const F32 d;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j <= i; j += hn::Lanes(d)) {
      const VF t = hn::Load(d, w.T + j / kPanel * M::kChunk * kPanel + i * kPanel + j % kPanel);
      const auto below = hn::Lt(hn::Iota(d, static_cast<float>(j)), hn::Set(d, static_cast<float>(i)));
      store_lanes<M::kInverse>(d, hn::IfThenElseZero(below, t), w.inverse + i * M::kChunk + j, M::kSquare);
    }
  }
}

// ---- all of it ------------------------------------------------------------------------------------------------------

template <class M>
void stage_head(const ChunkGatedDeltaRuleArgs& args, int64_t head, int64_t token, size_t count, size_t rows,
                Work<M>& w) {
  stage_gates(args, head, token, count, w);
  for (size_t row = 0; row < M::kChunk; row += kBlock) {
    for (size_t column = 0; column < row; column += kBlock) weigh_block<false>(row, column, w);
    weigh_block<true>(row, row, w);
  }
  invert(rows, w);
  pack_inverse(rows, w);
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CHUNK_GATES_INL_H_
