// SPDX-License-Identifier: Apache-2.0
// A group of panels of V through a chunk: R, U, the outputs and the new state. FLA: the stage's name in
// flash-linear-attention; recompute_w_u has no counterpart, because T (beta R) is one product here.
#if defined(XGDN_CORE_KERNELS_CPU_CHUNK_GROUP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CHUNK_GROUP_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CHUNK_GROUP_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CHUNK_GROUP_INL_H_
#endif

#include <algorithm>
#include <type_traits>

#include "core/kernels/cpu/chunk_work-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// How a chunk's step of the state is rounded.
enum class StateStep {
  kDecayed,       // S exp(b_C) + change
  kNear,          // S + (S expm1(b_C) + change)
  kNearToRest,    // the same, and what rounding leaves is kept
  kNearWithRest,  // the same, with what the step before it has left
};

// The states of a group's panels.
template <class M>
struct GroupState {
  float* S = nullptr;
  float* rest = nullptr;                  // as S
  typename M::Element* packed = nullptr;  // operands; unused where S is one itself
};

// What a group of panels works on.
struct Group {
  int64_t head = 0;
  int64_t v_begin = 0;
  int64_t token = 0;
  size_t count = 0;  // tokens
  size_t rows = 0;   // tokens, padded
  size_t panels = 0;
  StateStep step = StateStep::kDecayed;
};

// ---- products -------------------------------------------------------------------------------------------------------

// c (+)= rows [row, row + 32) of K or Q times S^T.
template <class M>
void multiply_state(const Work<M>& w, const Group& group, const typename M::Element* rows,
                    const typename M::Element* state, size_t row, float* c) {
  Product<typename M::Element> p;
  p.rows = M::kStrip;
  p.panels = group.panels;
  p.a_stride = w.depth;
  p.b_stride = w.depth * kPanel;
  p.c = c;
  p.c_stride = M::kStrip * kPanel;
  set_terms<M::kKeys, M::kState>(p, w.depth, rows + row * w.depth, w.keys_size(), state, w.state_part);
  run(w, p);
}

// c (+)= rows [row, row + 32) of the lower triangle a times b.
template <size_t kAParts, size_t kBParts, class M>
void multiply_lower(const Work<M>& w, const Group& group, const typename M::Element* a, const typename M::Element* b,
                    size_t row, bool accumulate, float* c) {
  Product<typename M::Element> p;
  p.rows = M::kStrip;
  p.panels = group.panels;
  p.a_stride = M::kChunk;
  p.b_stride = M::kChunk * kPanel;
  p.c = c;
  p.c_stride = M::kStrip * kPanel;
  p.accumulate = accumulate;
  set_terms<kAParts, kBParts>(p, row + M::kStrip, a + row * M::kChunk, M::kSquare, b, M::kGroupSize);
  run(w, p);
}

// ---- sweeps between them --------------------------------------------------------------------------------------------

// Rows of v as they lie, or staged.
template <class V>
struct ValueRows {
  const V* first = nullptr;
  int64_t stride = 0;
};

// R = beta (v - exp(b) K S^T) in the place of K S^T, packed as well.
template <class M, class V>
void form_errors(const Group& group, size_t row, ValueRows<V> v, float* HWY_RESTRICT R, const Work<M>& w) {
  const F32 d;
  const Gates<M>& gates = w.gates;
  for (size_t t = 0; t < M::kStrip; t += 2) {
    const size_t token = row + t;
    const VF beta0 = hn::Set(d, gates.beta[token]), beta1 = hn::Set(d, gates.beta[token + 1]);
    const VF decay0 = hn::Set(d, gates.k_from_state[token]), decay1 = hn::Set(d, gates.k_from_state[token + 1]);
    const V* from = v.first + token * v.stride;
    for (size_t panel = 0; panel < group.panels; ++panel, from += kPanel) {
      float* c = R + (panel * M::kStrip + t) * kPanel;
      auto* to = w.errors + panel * M::kChunk * kPanel;
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const VF v0 = token < group.count ? load(d, from + lane) : hn::Zero(d);
        const VF v1 = token + 1 < group.count ? load(d, from + v.stride + lane) : hn::Zero(d);
        const VF r0 = hn::Mul(beta0, hn::NegMulAdd(decay0, hn::Load(d, c + lane), v0));
        const VF r1 = hn::Mul(beta1, hn::NegMulAdd(decay1, hn::Load(d, c + kPanel + lane), v1));
        hn::Store(r0, d, c + lane);
        hn::Store(r1, d, c + kPanel + lane);
        store_pair<M::kErrors>(d, r0, r1, pair_at(to, token / 2, lane), M::kGroupSize);
      }
    }
  }
}

// U for the outputs and, decayed to the chunk's end, for the state.
template <class M>
void pack_writes(const Group& group, size_t row, const float* HWY_RESTRICT U, const Work<M>& w) {
  const F32 d;
  for (size_t panel = 0; panel < group.panels; ++panel) {
    auto* writes = w.writes + panel * M::kChunk * kPanel;
    auto* updates = w.updates + panel * M::kChunk * kPanel;
    for (size_t t = 0; t < M::kStrip; t += 2) {
      const size_t token = row + t;
      const VF decay0 = hn::Set(d, w.gates.to_state[token]), decay1 = hn::Set(d, w.gates.to_state[token + 1]);
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const float* u = U + (panel * M::kStrip + t) * kPanel + lane;
        const VF u0 = hn::Load(d, u), u1 = hn::Load(d, u + kPanel);
        store_pair<M::kWrites>(d, u0, u1, pair_at(writes, token / 2, lane), M::kGroupSize);
        store_pair<M::kUpdates>(d, hn::Mul(u0, decay0), hn::Mul(u1, decay1), pair_at(updates, token / 2, lane),
                                M::kGroupSize);
      }
    }
  }
}

// o = scale exp(b) Q S^T + tril(D Q K^T) U
template <class M, class O>
void write_outputs(const Group& group, size_t row, const float* HWY_RESTRICT o_state, const float* HWY_RESTRICT o_chunk,
                   O* out, int64_t stride, const Work<M>& w) {
  const F32 d;
  const size_t last = std::min(M::kStrip, group.count - row);
  for (size_t t = 0; t < last; ++t) {
    const VF decay = hn::Set(d, w.gates.q_from_state[row + t]);
    for (size_t panel = 0; panel < group.panels; ++panel) {
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const size_t at = (panel * M::kStrip + t) * kPanel + lane;
        store(d, hn::MulAdd(hn::Load(d, o_state + at), decay, hn::Load(d, o_chunk + at)),
              out + (row + t) * stride + panel * kPanel + lane);
      }
    }
  }
}

template <StateStep kStep>
HWY_INLINE VF advanced(F32 d, VF x, VF factor, VF change, float* rest) {
  VF difference = hn::MulAdd(x, factor, change);
  if constexpr (kStep == StateStep::kDecayed) return difference;
  if constexpr (kStep == StateStep::kNearWithRest) difference = hn::Add(difference, hn::Load(d, rest));
  const VF sum = hn::Add(x, difference);
  if constexpr (kStep == StateStep::kNearToRest) hn::Store(hn::Sub(difference, hn::Sub(sum, x)), d, rest);
  return sum;
}

// S <- exp(b_C) S + change for `rows` rows of K, packed as well.
template <StateStep kStep, class M>
void advance_state(size_t rows, float whole, const float* HWY_RESTRICT change, float* HWY_RESTRICT S,
                   float* HWY_RESTRICT rest, typename M::Element* state, size_t state_part) {
  const F32 d;
  const VF factor = hn::Set(d, whole);
  for (size_t i = 0; i < rows; i += 2) {
    for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
      const auto advance = [&](size_t at) HWY_ATTR {
        const VF x = advanced<kStep>(d, hn::Load(d, S + at), factor, hn::Load(d, change + at), rest + at);
        hn::Store(x, d, S + at);
        return x;
      };
      const VF even = advance(i * kPanel + lane);
      const VF odd = advance((i + 1) * kPanel + lane);
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
  p.rows = std::min(M::kStrip, w.K - row);
  p.panels = group.panels;
  p.a_stride = M::kChunk;
  p.b_stride = M::kChunk * kPanel;
  p.c = c;
  p.c_stride = M::kStrip * kPanel;
  set_terms<M::kKeys, M::kUpdates>(p, group.rows, w.k_columns + row * M::kChunk, w.K * M::kChunk, w.updates,
                                   M::kGroupSize);
  run(w, p);
}

template <StateStep kStep, class M>
void advance_group(const Work<M>& w, const Group& group, size_t row, const float* change, const GroupState<M>& s) {
  const size_t rows = std::min(M::kStrip, w.K - row);
  for (size_t panel = 0; panel < group.panels; ++panel) {
    const size_t at = (panel * w.K + row) * kPanel;
    advance_state<kStep, M>(rows, w.gates.whole, change + panel * M::kStrip * kPanel, s.S + at, s.rest + at,
                            s.packed + (panel * w.depth + row) * kPanel, w.state_part);
  }
}

template <class M>
void advance_group(const Work<M>& w, const Group& group, size_t row, const float* change, const GroupState<M>& s) {
  switch (group.step) {
    case StateStep::kDecayed:
      return advance_group<StateStep::kDecayed>(w, group, row, change, s);
    case StateStep::kNear:
      return advance_group<StateStep::kNear>(w, group, row, change, s);
    case StateStep::kNearToRest:
      return advance_group<StateStep::kNearToRest>(w, group, row, change, s);
    case StateStep::kNearWithRest:
      return advance_group<StateStep::kNearWithRest>(w, group, row, change, s);
  }
}

template <class M>
void form_errors(const ChunkGatedDeltaRuleArgs& args, const Group& group, size_t row, float* R, const Work<M>& w) {
  if (args.v.dtype == DType::kBFloat16) {
    const uint16_t* first = static_cast<const uint16_t*>(args.v.at(group.token, group.head)) + group.v_begin;
    form_errors(group, row, ValueRows<uint16_t>{first, args.v.token_stride}, R, w);
    return;
  }
  const size_t last = std::min(M::kStrip, group.count - std::min(row, group.count));
  for (size_t t = row; t < row + last; ++t) {
    const char* from = static_cast<const char*>(args.v.at(group.token + t, group.head));
    load_row(args.v.dtype, from + group.v_begin * size_of(args.v.dtype), group.panels * kPanel,
             w.rows + t * kGroup * kPanel);
  }
  form_errors(group, row, ValueRows<float>{w.rows, kGroup * kPanel}, R, w);
}

template <class M>
void write_outputs(const ChunkGatedDeltaRuleArgs& args, const Group& group, size_t row, const float* o_state,
                   const float* o_chunk, const Work<M>& w) {
  if (row >= group.count) return;
  if (args.out.dtype == DType::kBFloat16) {
    uint16_t* first = static_cast<uint16_t*>(args.out.at(group.token, group.head)) + group.v_begin;
    write_outputs(group, row, o_state, o_chunk, first, args.out.token_stride, w);
    return;
  }
  write_outputs(group, row, o_state, o_chunk, w.rows, kGroup * kPanel, w);
  for (size_t t = row; t < std::min(row + M::kStrip, group.count); ++t) {
    char* to = static_cast<char*>(args.out.at(group.token + t, group.head));
    store_row(args.out.dtype, w.rows + t * kGroup * kPanel, group.panels * kPanel,
              to + group.v_begin * size_of(args.out.dtype));
  }
}

// ---- the chunk: R and U (FLA: the v_new of fwd_h), outputs (fwd_o), state (fwd_h) -----------------------------------

// The group's tokens. A product is started before the sweep over the one before it: tiles and vectors work at once.
template <class M>
void step_group(const ChunkGatedDeltaRuleArgs& args, const Group& group, const GroupState<M>& s, const Work<M>& w) {
  const typename M::Element* packed = s.packed;
  if constexpr (std::is_same_v<typename M::Element, float>) packed = s.S;
  const auto strip = [](float* rows, size_t row) { return rows + row * kGroup * kPanel; };
  float* const U = w.R;  // from the product with the inverse on
  for (size_t row = 0; row < group.rows; row += M::kStrip) {
    multiply_state(w, group, w.k_rows, packed, row, strip(w.R, row));
  }
  for (size_t row = 0; row < group.rows; row += M::kStrip) {
    multiply_state(w, group, w.q_rows, packed, row, strip(w.o_state, row));
    form_errors(args, group, row, strip(w.R, row), w);
  }
  for (size_t row = 0; row < group.rows; row += M::kStrip) {
    multiply_lower<M::kInverse, M::kErrors>(w, group, w.inverse, w.errors, row, true, strip(U, row));
  }
  for (size_t row = 0; row < group.rows; row += M::kStrip) {
    pack_writes(group, row, strip(U, row), w);
    multiply_lower<M::kScores, M::kWrites>(w, group, w.scores, w.writes, row, false, strip(w.o_chunk, row));
  }
  const auto change = [&](size_t row) { return w.change + row / M::kStrip % 2 * kGroup * M::kStrip * kPanel; };
  multiply_updates(w, group, 0, change(0));
  for (size_t row = 0; row < group.rows; row += M::kStrip) {
    write_outputs(args, group, row, strip(w.o_state, row), strip(w.o_chunk, row), w);
  }
  for (size_t row = 0; row < w.K; row += M::kStrip) {
    if (row + M::kStrip < w.K) multiply_updates(w, group, row + M::kStrip, change(row + M::kStrip));
    advance_group(w, group, row, change(row), s);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CHUNK_GROUP_INL_H_
