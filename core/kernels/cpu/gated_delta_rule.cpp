// SPDX-License-Identifier: Apache-2.0
// Gated delta rule, token by token: recurrent_gated_delta_rule, packed_decode and chunk_gated_delta_rule. Prefill uses
// the recurrence as well, in tiles of state rows that stay in the first-level cache while a chunk of tokens passes.
//
//   S: [V, K], rows contiguous.   alpha = exp(g)
//   u = beta (v - alpha S k)          prediction error
//   S <- alpha S + u k^T              decay, then rank-1 write
//   o = scale * S q                   read
// Because S' q = alpha S q + u (k.q), one sweep over the old S gives both S k and S q; and the sweep that writes token
// t gives both products of token t + 1.
//
//            K ->            Loop: sequence, value head, block of V rows (a work item) -> chunk of tokens -> tile of
//        +---------+         rows -> token -> 4 rows -> K lanes.
//        | row . k | -> u    A single token needs no tile: 4 rows are read, both products taken, and written.
//   V    | row . q | -> o
//   |    +---------+
//
// Rounding: everything is f32 inside. S is rounded to its own type where it is written: after the call's last token, or
// after each token of a verification. q, k, v are widened exactly; the norms, k.q and the gates are f32; o is rounded
// to its type once. Where alpha > 0.6 the step is S + (S expm1(g) + u k), rounded once: rounding alpha, or S after the
// decay, would bias every step of a slow decay the same way. Order of sums: lane i of a row's product adds
// k = i, i + lanes, ... ascending; then lanes 4 apart in steps of two (fold_rows). It depends on the instruction set
// alone, so a call's bits do not depend on threads, batch or split.
#include "core/kernels/cpu/gated_delta_rule.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/gated_delta_rule.cpp"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kChunk = 64;  // tokens staged at once: with K = 128 their k and q fill 64 KiB
constexpr size_t kTile = 16;   // rows of S per tile: 8 KiB
constexpr size_t kRows = 4;    // rows per sweep: they share each load of k and q
constexpr float kNearOne = -0.5f;
constexpr float kNormEps = 1e-6f;
constexpr size_t kCacheLine = 64;
constexpr size_t kPrefetchBytes = 4096;  // how far reads run ahead of a single token

using F4 = hn::CappedTag<float, kRows>;

// The decay of one token.
struct Decay {
  float factor = 0;      // alpha, or alpha - 1 where is_near
  bool is_near = false;  // alpha is near one
};

Decay make_decay(float g) {
  if (g > kNearOne) return {std::expm1(g), true};
  return {std::exp(g), false};
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

// S k and S q of 4 rows.
struct Products {
  HWY_ALIGN float sk[kRows];
  HWY_ALIGN float sq[kRows];
};

// Products of 4 rows that start at `rows`.
template <typename Src>
HWY_INLINE void multiply(const Src* HWY_RESTRICT rows, size_t K, const float* HWY_RESTRICT k,
                         const float* HWY_RESTRICT q, Products& products) {
  const F32 d;
  VF k0 = hn::Zero(d), k1 = k0, k2 = k0, k3 = k0;
  VF q0 = k0, q1 = k0, q2 = k0, q3 = k0;
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    const VF ki = hn::LoadU(d, k + i);
    const VF qi = hn::LoadU(d, q + i);
    const VF s0 = load(d, rows + i);
    const VF s1 = load(d, rows + K + i);
    const VF s2 = load(d, rows + 2 * K + i);
    const VF s3 = load(d, rows + 3 * K + i);
    k0 = hn::MulAdd(s0, ki, k0);
    k1 = hn::MulAdd(s1, ki, k1);
    k2 = hn::MulAdd(s2, ki, k2);
    k3 = hn::MulAdd(s3, ki, k3);
    q0 = hn::MulAdd(s0, qi, q0);
    q1 = hn::MulAdd(s1, qi, q1);
    q2 = hn::MulAdd(s2, qi, q2);
    q3 = hn::MulAdd(s3, qi, q3);
  }
  fold_rows(d, k0, k1, k2, k3, products.sk);
  fold_rows(d, q0, q1, q2, q3, products.sq);
}

// S <- alpha S + u k^T for 4 rows. dst may be src.
template <bool kIsNear, typename Src, typename Dst>
HWY_INLINE void update(const Src* src, Dst* dst, size_t K, float decay, const float* HWY_RESTRICT u,
                       const float* HWY_RESTRICT k) {
  const F32 d;
  const VF factor = hn::Set(d, decay);
  const VF u0 = hn::Set(d, u[0]), u1 = hn::Set(d, u[1]), u2 = hn::Set(d, u[2]), u3 = hn::Set(d, u[3]);
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    const VF ki = hn::LoadU(d, k + i);
    store(d, advanced<kIsNear>(load(d, src + i), factor, u0, ki), dst + i);
    store(d, advanced<kIsNear>(load(d, src + K + i), factor, u1, ki), dst + K + i);
    store(d, advanced<kIsNear>(load(d, src + 2 * K + i), factor, u2, ki), dst + 2 * K + i);
    store(d, advanced<kIsNear>(load(d, src + 3 * K + i), factor, u3, ki), dst + 3 * K + i);
  }
}

// update() with one token's k and multiply() with the next token's k and q, in one sweep.
template <bool kIsNear>
HWY_INLINE void update_and_multiply(float* HWY_RESTRICT rows, size_t K, float decay, const float* HWY_RESTRICT u,
                                    const float* HWY_RESTRICT k, const float* HWY_RESTRICT next_k,
                                    const float* HWY_RESTRICT next_q, Products& products) {
  const F32 d;
  const VF factor = hn::Set(d, decay);
  const VF u0 = hn::Set(d, u[0]), u1 = hn::Set(d, u[1]), u2 = hn::Set(d, u[2]), u3 = hn::Set(d, u[3]);
  VF k0 = hn::Zero(d), k1 = k0, k2 = k0, k3 = k0;
  VF q0 = k0, q1 = k0, q2 = k0, q3 = k0;
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    const VF ki = hn::LoadU(d, k + i);
    const VF s0 = advanced<kIsNear>(hn::LoadU(d, rows + i), factor, u0, ki);
    const VF s1 = advanced<kIsNear>(hn::LoadU(d, rows + K + i), factor, u1, ki);
    const VF s2 = advanced<kIsNear>(hn::LoadU(d, rows + 2 * K + i), factor, u2, ki);
    const VF s3 = advanced<kIsNear>(hn::LoadU(d, rows + 3 * K + i), factor, u3, ki);
    hn::StoreU(s0, d, rows + i);
    hn::StoreU(s1, d, rows + K + i);
    hn::StoreU(s2, d, rows + 2 * K + i);
    hn::StoreU(s3, d, rows + 3 * K + i);
    const VF nk = hn::LoadU(d, next_k + i);
    const VF nq = hn::LoadU(d, next_q + i);
    k0 = hn::MulAdd(s0, nk, k0);
    k1 = hn::MulAdd(s1, nk, k1);
    k2 = hn::MulAdd(s2, nk, k2);
    k3 = hn::MulAdd(s3, nk, k3);
    q0 = hn::MulAdd(s0, nq, q0);
    q1 = hn::MulAdd(s1, nq, q1);
    q2 = hn::MulAdd(s2, nq, q2);
    q3 = hn::MulAdd(s3, nq, q3);
  }
  fold_rows(d, k0, k1, k2, k3, products.sk);
  fold_rows(d, q0, q1, q2, q3, products.sq);
}

// Tokens of one work item in f32, staged in scratch memory.
struct Chunk {
  float* k;  // [kChunk, K]        normalised
  float* q;  // [kChunk, K]        normalised
  float* v;  // [kChunk, v_block]
  float* o;  // [kChunk, v_block]
  float* S;  // [v_block, K]       the state of several tokens
  float kq[kChunk];
  float beta[kChunk];
  Decay decay[kChunk];
};

// u and o of 4 rows of token t, from the products with the state before it. `row` counts from the block's first.
template <bool kIsNear>
HWY_INLINE void read_out_as(const Products& products, float scale, size_t v_block, size_t t, size_t row, Chunk& c,
                            float* HWY_RESTRICT u) {
  const F4 d;
  const auto factor = hn::Set(d, c.decay[t].factor);
  for (size_t i = 0; i < kRows; i += hn::Lanes(d)) {
    const auto v = hn::LoadU(d, c.v + t * v_block + row + i);
    const auto error = hn::Sub(v, decayed<kIsNear>(hn::Load(d, products.sk + i), factor));
    const auto write = hn::Mul(hn::Set(d, c.beta[t]), error);
    const auto read = hn::MulAdd(write, hn::Set(d, c.kq[t]), decayed<kIsNear>(hn::Load(d, products.sq + i), factor));
    hn::StoreU(write, d, u + i);
    hn::StoreU(hn::Mul(hn::Set(d, scale), read), d, c.o + t * v_block + row + i);
  }
}

HWY_INLINE void read_out(const Products& products, const GatedDeltaRuleArgs& args, size_t t, size_t row, Chunk& c,
                         float* HWY_RESTRICT u) {
  if (c.decay[t].is_near) {
    read_out_as<true>(products, args.scale, args.v_block, t, row, c, u);
  } else {
    read_out_as<false>(products, args.scale, args.v_block, t, row, c, u);
  }
}

// A work item: rows [v_begin, v_begin + num_rows) of value head h of sequence n.
struct Item {
  int64_t n, h;
  int64_t v_begin, num_rows;
  int64_t begin, end;  // tokens
};

template <typename State>
State* state_rows(const GatedDeltaRuleArgs& args, const Item& item, int32_t slot) {
  return static_cast<State*>(args.state) + slot * args.slot_stride + (item.h * args.V + item.v_begin) * args.K;
}

// k and q of a token: widened, normalised, and their product.
void stage_keys(const GatedDeltaRuleArgs& args, const Item& item, int64_t token, size_t t, Chunk& c) {
  const F32 d;
  const size_t K = args.K;
  const int64_t key_head = item.h / (args.HV / args.H);
  float* HWY_RESTRICT k = c.k + t * K;
  float* HWY_RESTRICT q = c.q + t * K;
  load_row(args.k.dtype, args.k.at(token, key_head), K, k);
  load_row(args.q.dtype, args.q.at(token, key_head), K, q);
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
  c.kq[t] = sums[2];
  if (!args.normalise_qk) return;
  const float k_scale = 1.0f / std::sqrt(sums[0] + kNormEps);
  const float q_scale = 1.0f / std::sqrt(sums[1] + kNormEps);
  c.kq[t] *= k_scale * q_scale;
  const VF k_scales = hn::Set(d, k_scale);
  const VF q_scales = hn::Set(d, q_scale);
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    hn::StoreU(hn::Mul(hn::LoadU(d, k + i), k_scales), d, k + i);
    hn::StoreU(hn::Mul(hn::LoadU(d, q + i), q_scales), d, q + i);
  }
}

void stage_gates(const GatedDeltaRuleArgs& args, const Item& item, int64_t token, size_t t, Chunk& c) {
  float g = load_scalar(args.g.dtype, args.g.at(token, item.h));
  float beta = load_scalar(args.beta.dtype, args.beta.at(token, item.h));
  if (args.A_log.data != nullptr) {
    const F32 d;
    const float A_log = load_scalar(args.A_log.dtype, args.A_log.at(0, item.h));
    const float dt_bias = load_scalar(args.dt_bias.dtype, args.dt_bias.at(0, item.h));
    g = hn::GetLane(log_decay(d, hn::Set(d, g), decay_rate(d, hn::Set(d, A_log)), hn::Set(d, dt_bias)));
    beta = hn::GetLane(sigmoid(d, hn::Set(d, beta)));
  }
  c.decay[t] = make_decay(g);
  c.beta[t] = beta;
}

// Stages up to kChunk tokens from `token`; returns how many.
size_t stage(const GatedDeltaRuleArgs& args, const Item& item, int64_t token, Chunk& c) {
  const size_t count = std::min<int64_t>(kChunk, item.end - token);
  for (size_t t = 0; t < count; ++t) {
    stage_keys(args, item, token + t, t, c);
    stage_gates(args, item, token + t, t, c);
    const int64_t v_offset = item.v_begin * size_of(args.v.dtype);
    load_row(args.v.dtype, static_cast<const char*>(args.v.at(token + t, item.h)) + v_offset, item.num_rows,
             c.v + t * args.v_block);
  }
  return count;
}

void* out_rows(const GatedDeltaRuleArgs& args, const Item& item, int64_t token) {
  return static_cast<char*>(args.out.at(token, item.h)) + item.v_begin * size_of(args.out.dtype);
}

void write_outputs(const GatedDeltaRuleArgs& args, const Item& item, int64_t token, size_t count, const Chunk& c) {
  for (size_t t = 0; t < count; ++t) {
    store_row(args.out.dtype, c.o + t * args.v_block, item.num_rows, out_rows(args, item, token + t));
  }
}

HWY_INLINE void prefetch(const void* from, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kCacheLine) hwy::Prefetch(static_cast<const char*>(from) + i);
}

// One token, from the slot that is read straight to the slot that is written (null: none). The prefetch runs past the
// block's last row into the next head, which is usually the next work item.
template <bool kIsNear, typename State>
void step(const GatedDeltaRuleArgs& args, const Item& item, const State* src, State* dst, Chunk& c) {
  const size_t K = args.K;
  const size_t num_rows = item.num_rows;
  for (size_t row = 0; row < num_rows; row += kRows) {
    prefetch(reinterpret_cast<const char*>(src + row * K) + kPrefetchBytes, kRows * K * sizeof(State));
    HWY_ALIGN float u[kRows];
    Products products;
    multiply(src + row * K, K, c.k, c.q, products);
    read_out_as<kIsNear>(products, args.scale, args.v_block, 0, row, c, u);
    if (dst != nullptr) update<kIsNear>(src + row * K, dst + row * K, K, c.decay[0].factor, u, c.k);
  }
}

// The chunk's tokens through the tile of c.S that starts at `tile`. after_token(t, S) sees the tile after token t.
template <class AfterToken>
void step_tile(const GatedDeltaRuleArgs& args, size_t tile, size_t count, Chunk& c, const AfterToken& after_token) {
  const size_t K = args.K;
  float* HWY_RESTRICT S = c.S + tile * K;
  HWY_ALIGN float u[kTile];
  Products products;
  for (size_t row = 0; row < kTile; row += kRows) {
    multiply(S + row * K, K, c.k, c.q, products);
    read_out(products, args, 0, tile + row, c, u + row);
  }
  for (size_t t = 1; t < count; ++t) {
    const Decay decay = c.decay[t - 1];
    const float* k = c.k + (t - 1) * K;
    const float* next_k = c.k + t * K;
    const float* next_q = c.q + t * K;
    for (size_t row = 0; row < kTile; row += kRows) {
      if (decay.is_near) {
        update_and_multiply<true>(S + row * K, K, decay.factor, u + row, k, next_k, next_q, products);
      } else {
        update_and_multiply<false>(S + row * K, K, decay.factor, u + row, k, next_k, next_q, products);
      }
      read_out(products, args, t, tile + row, c, u + row);
    }
    after_token(t - 1, S);
  }
  const Decay decay = c.decay[count - 1];
  const float* k = c.k + (count - 1) * K;
  for (size_t row = 0; row < kTile; row += kRows) {
    if (decay.is_near) {
      update<true>(S + row * K, S + row * K, K, decay.factor, u + row, k);
    } else {
      update<false>(S + row * K, S + row * K, K, decay.factor, u + row, k);
    }
  }
  after_token(count - 1, S);
}

template <typename Src, typename Dst>
void copy_rows(const Src* src, Dst* dst, size_t count) {
  const F32 d;
  for (size_t i = 0; i < count; i += hn::Lanes(d)) store(d, load(d, src + i), dst + i);
}

// Any number of tokens, none included: the state is widened to c.S, advanced there, and written where the call says.
template <typename State>
void step_sequence(const GatedDeltaRuleArgs& args, const Item& item, const State* src, Chunk& c) {
  const size_t K = args.K;
  const size_t size = item.num_rows * K;
  if (src != nullptr) {
    copy_rows(src, c.S, size);
  } else {
    std::fill_n(c.S, size, 0.0f);
  }
  for (int64_t token = item.begin; token < item.end; token += kChunk) {
    const size_t count = stage(args, item, token, c);
    for (size_t tile = 0; tile < static_cast<size_t>(item.num_rows); tile += kTile) {
      step_tile(args, tile, count, c, [&](size_t t, const float* S) {
        if (args.num_accepted == nullptr) return;
        const int32_t slot = args.read_slots[item.n * args.L + (token - item.begin) + t];
        if (slot >= 0) copy_rows(S, state_rows<State>(args, item, slot) + tile * K, kTile * K);
      });
    }
    write_outputs(args, item, token, count, c);
  }
  if (args.num_accepted != nullptr) return;
  const int32_t slot = args.write_slots[item.n];
  if (slot >= 0) copy_rows(c.S, state_rows<State>(args, item, slot), size);
}

template <typename State>
void run_item(const GatedDeltaRuleArgs& args, const Item& item) {
  const bool is_verification = args.num_accepted != nullptr;
  const int64_t column = is_verification ? args.num_accepted[item.n] - 1 : 0;
  const int32_t read_slot = args.read_slots[item.n * args.L + column];
  if (read_slot < 0) {
    for (int64_t t = item.begin; t < item.end; ++t) {
      std::memset(out_rows(args, item, t), 0, item.num_rows * size_of(args.out.dtype));
    }
    return;
  }
  const bool has_initial_state = args.has_initial_state == nullptr || args.has_initial_state[item.n];
  const State* src = has_initial_state ? state_rows<State>(args, item, read_slot) : nullptr;
  const bool is_single = item.end - item.begin == 1 && src != nullptr;

  const size_t keys = kChunk * args.K;
  const size_t values = kChunk * args.v_block;
  Chunk c;
  c.k = scratch<Chunk>(2 * keys + 2 * values + args.v_block * args.K);
  c.q = c.k + keys;
  c.v = c.q + keys;
  c.o = c.v + values;
  c.S = c.o + values;
  if (!is_single) {
    step_sequence<State>(args, item, src, c);
    return;
  }
  prefetch(src, kPrefetchBytes);  // while the token is staged
  stage(args, item, item.begin, c);
  const int32_t write_slot = is_verification ? args.read_slots[item.n * args.L] : args.write_slots[item.n];
  State* dst = write_slot >= 0 ? state_rows<State>(args, item, write_slot) : nullptr;
  if (c.decay[0].is_near) {
    step<true>(args, item, src, dst, c);
  } else {
    step<false>(args, item, src, dst, c);
  }
  write_outputs(args, item, item.begin, 1, c);
}

void gated_delta_rule(const GatedDeltaRuleArgs& args, int64_t index) {
  const int64_t blocks = (args.V + args.v_block - 1) / args.v_block;
  Item item;
  item.n = index / (blocks * args.HV);
  item.h = index / blocks % args.HV;
  item.v_begin = index % blocks * args.v_block;
  item.num_rows = std::min(args.v_block, args.V - item.v_begin);
  item.begin = args.cu_seqlens != nullptr ? args.cu_seqlens[item.n] : item.n;
  item.end = args.cu_seqlens != nullptr ? args.cu_seqlens[item.n + 1] : item.n + 1;
  if (args.is_state_bfloat16) {
    run_item<BFloat16Bits>(args, item);
  } else {
    run_item<float>(args, item);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(gated_delta_rule);

void gated_delta_rule(const GatedDeltaRuleArgs& args, int64_t item) {
  HWY_DYNAMIC_DISPATCH(gated_delta_rule)(args, item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
