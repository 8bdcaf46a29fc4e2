// SPDX-License-Identifier: Apache-2.0
// One token of the gated delta rule on rows of S, inside one instruction set: shared by the ops and the fused decode
// step, so that they give the same bits.
//
//   S: [V, K], rows contiguous.   alpha = exp(g)
//   u = beta (v - alpha S k)          prediction error
//   S <- alpha S + u k^T              decay, then rank-1 write
//   o = scale * S q                   read
// Because S' q = alpha S q + u (k.q), one sweep over the old S gives both S k and S q; and the sweep that writes token
// t gives both products of token t + 1.
//
// Rounding: everything is f32 inside. Where alpha > 0.6 the step is S + (S expm1(g) + u k), rounded once: rounding
// alpha, or S after the decay, would bias every step of a slow decay the same way.
// Order of sums: a row is read in pairs of vectors (load_pair), k and q lie in the same order. Of an f32 pool lane i
// adds k = i, i + lanes, i + 2 lanes, ...; of a bf16 pool k = 2 i, 2 i + 1, 2 (i + lanes), ...; an odd last vector of
// 16 lanes is read in place. Then lanes 4 apart in steps of two (fold_rows). The order depends on the instruction set
// and the pool's type alone, so a call's bits do not depend on threads, batch or split.
#if defined(XGDN_CORE_KERNELS_CPU_RECURRENT_GATED_DELTA_RULE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_RECURRENT_GATED_DELTA_RULE_INL_H_
#undef XGDN_CORE_KERNELS_CPU_RECURRENT_GATED_DELTA_RULE_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_RECURRENT_GATED_DELTA_RULE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/kernels/cpu/simd-inl.h"
#include "core/kernels/op_args.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kRows = 4;              // rows per sweep: they share each load of k and q
inline constexpr size_t kTile = 16;             // rows of S that several tokens pass through: 8 KiB
inline constexpr size_t kPrefetchBytes = 4096;  // how far reads run ahead

using F4 = hn::CappedTag<float, kRows>;

// The decay of one token.
struct Decay {
  float factor = 0;      // alpha, or alpha - 1 where is_near
  bool is_near = false;  // alpha is near one
};

template <typename Float>
Decay make_decay(Float g) {
  if (g > kNearOne) return {static_cast<float>(std::expm1(g)), true};
  return {static_cast<float>(std::exp(g)), false};
}

template <bool kIsNear, class V>
HWY_INLINE V decayed(V x, V factor) {
  if constexpr (kIsNear) {
    return hn::MulAdd(factor, x, x);
  } else {
    return hn::Mul(factor, x);
  }
}

// alpha s + u k. Near one, what changes is summed first and s is rounded once: a decay below its rounding still counts.
template <bool kIsNear, class V>
HWY_INLINE V advanced(V s, V factor, V u, V k) {
  const V change = hn::MulAdd(u, k, hn::Mul(factor, s));
  if constexpr (kIsNear) {
    return hn::Add(s, change);
  } else {
    return change;
  }
}

// sums[r] = sum of the lanes of row r.
HWY_INLINE void fold_rows(F32 d, VF row0, VF row1, VF row2, VF row3, float* HWY_RESTRICT sums) {
#if HWY_TARGET == HWY_SCALAR
  hn::Store(row0, d, sums);
  hn::Store(row1, d, sums + 1);
  hn::Store(row2, d, sums + 2);
  hn::Store(row3, d, sums + 3);
#else
  const hn::Repartition<uint64_t, F32> d64;
  // Within each block of 4 lanes: first lanes i and i + 2, then i and i + 1.
  const VF rows01 = hn::Add(hn::InterleaveLower(d, row0, row1), hn::InterleaveUpper(d, row0, row1));
  const VF rows23 = hn::Add(hn::InterleaveLower(d, row2, row3), hn::InterleaveUpper(d, row2, row3));
  const auto pairs01 = hn::BitCast(d64, rows01);
  const auto pairs23 = hn::BitCast(d64, rows23);
  const VF blocks = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, pairs01, pairs23)),
                            hn::BitCast(d, hn::InterleaveUpper(d64, pairs01, pairs23)));
  // Then the blocks, first to last.
  HWY_ALIGN float lanes[kMaxLanes];
  hn::Store(blocks, d, lanes);
  const F4 d4;
  auto sum = hn::Load(d4, lanes);
  for (size_t i = kRows; i < hn::Lanes(d); i += kRows) sum = hn::Add(sum, hn::Load(d4, lanes + i));
  hn::Store(sum, d4, sums);
#endif
}

// ---- 4 rows ---------------------------------------------------------------------------------------------------------

// S k and S q of 4 rows.
struct Products {
  HWY_ALIGN float sk[kRows];
  HWY_ALIGN float sq[kRows];
};

// Rows as they are stored.
template <typename State>
struct StoredRows {
  const State* rows;
  size_t K;

  HWY_INLINE void pair(F32 d, size_t row, size_t i, VF& first, VF& second) const {
    load_pair(d, rows + row * K + i, first, second);
  }
  HWY_INLINE VF single(F32 d, size_t row, size_t i) const { return load(d, rows + row * K + i); }
};

// alpha S + u k^T, written to dst, which may be src. Products see what was written, rounded.
template <bool kIsNear, typename State>
struct AdvancedRows {
  const State* src;
  State* dst;
  size_t K;
  float factor;
  const float* u;
  const float* k;

  HWY_INLINE void pair(F32 d, size_t row, size_t i, VF& first, VF& second) const {
    load_pair(d, src + row * K + i, first, second);
    first = at(d, row, i, first);
    second = at(d, row, i + hn::Lanes(d), second);
    store_pair(d, first, second, dst + row * K + i);
  }
  HWY_INLINE VF single(F32 d, size_t row, size_t i) const {
    VF s = at(d, row, i, load(d, src + row * K + i));
    store_rounded(d, s, dst + row * K + i);
    return s;
  }
  HWY_INLINE VF at(F32 d, size_t row, size_t i, VF s) const {
    return advanced<kIsNear>(s, hn::Set(d, factor), hn::Set(d, u[row]), hn::LoadU(d, k + i));
  }
};

HWY_INLINE VF add_products(VF s_first, VF s_second, VF x_first, VF x_second, VF sum) {
  return hn::MulAdd(s_second, x_second, hn::MulAdd(s_first, x_first, sum));
}

// Calls f(rows, K), K as a constant where it is the usual one: loops without a counter read further ahead of what they
// wait for. From memory a head of f32 takes 3.3 us instead of 4.2 (Zen 3).
template <class Rows, class F>
HWY_INLINE void with_usual_dim(Rows rows, size_t K, const F& f) {
  constexpr size_t kUsualDim = 128;
  if (K == kUsualDim) {
    rows.K = kUsualDim;
    f(rows, std::integral_constant<size_t, kUsualDim>());
  } else {
    f(rows, K);
  }
}

// S k and S q of 4 rows, taken from `rows` one after the other.
template <class Rows>
HWY_INLINE void multiply_rows(const Rows& rows, size_t K, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q,
                              Products& products) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  VF k0 = hn::Zero(d), k1 = k0, k2 = k0, k3 = k0;
  VF q0 = k0, q1 = k0, q2 = k0, q3 = k0;
  VF s, t;
  size_t i = 0;
  for (; i + 2 * lanes <= K; i += 2 * lanes) {
    const VF ks = hn::LoadU(d, k + i), kt = hn::LoadU(d, k + i + lanes);
    const VF qs = hn::LoadU(d, q + i), qt = hn::LoadU(d, q + i + lanes);
    rows.pair(d, 0, i, s, t);
    k0 = add_products(s, t, ks, kt, k0);
    q0 = add_products(s, t, qs, qt, q0);
    rows.pair(d, 1, i, s, t);
    k1 = add_products(s, t, ks, kt, k1);
    q1 = add_products(s, t, qs, qt, q1);
    rows.pair(d, 2, i, s, t);
    k2 = add_products(s, t, ks, kt, k2);
    q2 = add_products(s, t, qs, qt, q2);
    rows.pair(d, 3, i, s, t);
    k3 = add_products(s, t, ks, kt, k3);
    q3 = add_products(s, t, qs, qt, q3);
  }
  if (i < K) {
    const VF ks = hn::LoadU(d, k + i), qs = hn::LoadU(d, q + i);
    s = rows.single(d, 0, i);
    k0 = hn::MulAdd(s, ks, k0);
    q0 = hn::MulAdd(s, qs, q0);
    s = rows.single(d, 1, i);
    k1 = hn::MulAdd(s, ks, k1);
    q1 = hn::MulAdd(s, qs, q1);
    s = rows.single(d, 2, i);
    k2 = hn::MulAdd(s, ks, k2);
    q2 = hn::MulAdd(s, qs, q2);
    s = rows.single(d, 3, i);
    k3 = hn::MulAdd(s, ks, k3);
    q3 = hn::MulAdd(s, qs, q3);
  }
  fold_rows(d, k0, k1, k2, k3, products.sk);
  fold_rows(d, q0, q1, q2, q3, products.sq);
}

template <class Rows>
HWY_INLINE void multiply(const Rows& rows, size_t K, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q,
                         Products& products) {
  with_usual_dim(rows, K, [&](const auto& same, auto dim) HWY_ATTR { multiply_rows(same, dim, k, q, products); });
}

// Writes 4 rows without using them further.
template <class Rows>
HWY_INLINE void update_rows(const Rows& rows, size_t K) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  VF s, t;
  size_t i = 0;
  for (; i + 2 * lanes <= K; i += 2 * lanes) {
    for (size_t row = 0; row < kRows; ++row) rows.pair(d, row, i, s, t);
  }
  for (size_t row = 0; i < K && row < kRows; ++row) rows.single(d, row, i);
}

template <class Rows>
HWY_INLINE void update(const Rows& rows, size_t K) {
  with_usual_dim(rows, K, [&](const auto& same, auto dim) HWY_ATTR { update_rows(same, dim); });
}

// ---- one token ------------------------------------------------------------------------------------------------------

// What a value head needs of a token, staged in f32.
struct Token {
  const float* k;  // [K]  normalised, in the pool's order
  const float* q;  // [K]  as k
  const float* v;  // [rows]
  float* o;        // [rows]
  float kq;
  float beta;
  float scale;
  Decay decay;
};

// u and o of 4 rows, from the products with the state before the token. `row` counts from the first of v and o.
template <bool kIsNear>
HWY_INLINE void read_out_as(const Products& products, const Token& token, size_t row, float* HWY_RESTRICT u) {
  const F4 d;
  const auto factor = hn::Set(d, token.decay.factor);
  for (size_t i = 0; i < kRows; i += hn::Lanes(d)) {
    const auto v = hn::LoadU(d, token.v + row + i);
    const auto error = hn::Sub(v, decayed<kIsNear>(hn::Load(d, products.sk + i), factor));
    const auto write = hn::Mul(hn::Set(d, token.beta), error);
    const auto read = hn::MulAdd(write, hn::Set(d, token.kq), decayed<kIsNear>(hn::Load(d, products.sq + i), factor));
    hn::StoreU(write, d, u + i);
    hn::StoreU(hn::Mul(hn::Set(d, token.scale), read), d, token.o + row + i);
  }
}

HWY_INLINE void read_out(const Products& products, const Token& token, size_t row, float* HWY_RESTRICT u) {
  if (token.decay.is_near) {
    read_out_as<true>(products, token, row, u);
  } else {
    read_out_as<false>(products, token, row, u);
  }
}

// 4 rows after `token`, written to dst, which may be src.
template <typename State>
HWY_INLINE void write(const Token& token, const float* u, const State* src, State* dst, size_t K) {
  if (token.decay.is_near) {
    update(AdvancedRows<true, State>{src, dst, K, token.decay.factor, u, token.k}, K);
  } else {
    update(AdvancedRows<false, State>{src, dst, K, token.decay.factor, u, token.k}, K);
  }
}

// The same, and the products with the next token's k and q.
template <typename State>
HWY_INLINE void write_and_multiply(const Token& token, const float* u, const State* src, State* dst, size_t K,
                                   const Token& next, Products& products) {
  if (token.decay.is_near) {
    multiply(AdvancedRows<true, State>{src, dst, K, token.decay.factor, u, token.k}, K, next.k, next.q, products);
  } else {
    multiply(AdvancedRows<false, State>{src, dst, K, token.decay.factor, u, token.k}, K, next.k, next.q, products);
  }
}

// Fetches what lies `distance` bytes behind element `at` of `size` elements, past the last one in `next`, what is
// worked on then (null: unknown).
template <typename State>
HWY_INLINE void prefetch_ahead(const State* rows, size_t size, size_t at, size_t count, size_t distance,
                               const void* next) {
  const size_t ahead = at * sizeof(State) + distance;
  if (ahead < size * sizeof(State)) {
    prefetch(reinterpret_cast<const char*>(rows) + ahead, count * sizeof(State));
  } else if (next != nullptr) {
    prefetch(static_cast<const char*>(next) + (ahead - size * sizeof(State)), count * sizeof(State));
  }
}

// One token on num_rows rows, from the slot that is read straight to the slot that is written (null: none). Reads run
// kPrefetchBytes ahead, past the last row into `next`, what is worked on next (null: unknown).
template <typename State>
void step(const Token& token, const State* src, State* dst, size_t num_rows, size_t K, const void* next) {
  for (size_t row = 0; row < num_rows; row += kRows) {
    const State* rows = src + row * K;
    prefetch_ahead(src, num_rows * K, row * K, kRows * K, kPrefetchBytes, next);
    HWY_ALIGN float u[kRows];
    Products products;
    multiply(StoredRows<State>{rows, K}, K, token.k, token.q, products);
    read_out(products, token, row, u);
    if (dst != nullptr) write(token, u, rows, dst + row * K, K);
  }
}

// ---- staging --------------------------------------------------------------------------------------------------------

// To the order of load_pair.
template <typename State>
void to_pool_order(float* x, size_t K) {
  if constexpr (sizeof(State) == sizeof(BFloat16Bits)) {
    const size_t lanes = hn::Lanes(F32());
    float pairs[2 * kMaxLanes];
    for (size_t i = 0; i + 2 * lanes <= K; i += 2 * lanes) {
      std::copy_n(x + i, 2 * lanes, pairs);
      for (size_t lane = 0; lane < lanes; ++lane) {
        x[i + lane] = pairs[2 * lane];
        x[i + lanes + lane] = pairs[2 * lane + 1];
      }
    }
  }
}

inline void multiply_by(float* HWY_RESTRICT x, size_t K, float factor) {
  const F32 d;
  for (size_t i = 0; i < K; i += hn::Lanes(d)) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, factor)), d, x + i);
}

// Of a token in a value head.
struct TokenGates {
  float g;
  float beta;
};

// Given, or from their logits with the bits of gdn_gating.
inline TokenGates load_gates(const TokenDeltaRuleArgs& args, int64_t token, int64_t h) {
  const F32 d;
  const float g = load_scalar(args.g.dtype, args.g.at(token, h));
  const float beta = load_scalar(args.beta.dtype, args.beta.at(token, h));
  if (args.A_log.data == nullptr) return {g, beta};
  const VF rate = decay_rate(d, hn::Set(d, load_scalar(args.A_log.dtype, args.A_log.at(0, h))));
  const VF dt_bias = hn::Set(d, load_scalar(args.dt_bias.dtype, args.dt_bias.at(0, h)));
  return {hn::GetLane(log_decay(d, hn::Set(d, g), rate, dt_bias)), hn::GetLane(sigmoid(d, hn::Set(d, beta)))};
}

inline void stage_gates(const TokenGates& gates, Token& token) {
  token.decay = make_decay(gates.g);
  token.beta = gates.beta;
}

// Normalises the widened k and q of a key head where asked for, brings them into the pool's order, returns k.q.
template <typename State>
float stage_keys(float* HWY_RESTRICT k, float* HWY_RESTRICT q, size_t K, bool normalise) {
  const F32 d;
  VF kk = hn::Zero(d), qq = kk, kq = kk;
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    const VF ki = hn::LoadU(d, k + i);
    const VF qi = hn::LoadU(d, q + i);
    kk = hn::MulAdd(ki, ki, kk);
    qq = hn::MulAdd(qi, qi, qq);
    kq = hn::MulAdd(ki, qi, kq);
  }
  HWY_ALIGN float sums[kRows];
  fold_rows(d, kk, qq, kq, kq, sums);
  to_pool_order<State>(k, K);
  to_pool_order<State>(q, K);
  if (!normalise) return sums[2];
  const float k_scale = 1.0f / std::sqrt(sums[0] + kNormEps);
  const float q_scale = 1.0f / std::sqrt(sums[1] + kNormEps);
  multiply_by(k, K, k_scale);
  multiply_by(q, K, q_scale);
  return sums[2] * (k_scale * q_scale);
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_RECURRENT_GATED_DELTA_RULE_INL_H_
