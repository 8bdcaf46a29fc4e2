// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on checkpoints, S after the last multiple of C tokens and a ring of the tokens since then,
// inside one instruction set: shared by the op and the fused decode step, so that they give the same bits.
//
//   D_ji = exp(g_{i+1} + .. + g_j),  D_j0 that of all tokens since the checkpoint
//   u_j = beta_j (v_j - D_j0 S k_j - sum_{0 < i < j} D_ji (k_i . k_j) u_i)
//   o_j = scale  (D_j0 S q_j + sum_{0 < i <= j} D_ji (k_i . q_j) u_i)
//   S  <- D_C0 S + sum_i D_Ci u_i k_i^T          once the ring holds C tokens: the fold
//
//            K ->            Loop: sequence, key head (a work item) -> tokens up to the next fold -> value head ->
//        +---------+         tile of rows -> token -> rows -> K lanes; then token -> V lanes -> ring.
//        | row . k | -> S k  S is read once for all these tokens, and written by a fold alone. A tile of rows stays in
//   V    | row . q | -> S q  the first-level cache while the tokens pass through it.
//   |    +---------+
//
// Rounding: all is f32 but a bf16 S, which is rounded by each fold. Where D_C0 is near one the fold is
// S + (S (D_C0 - 1) + sum), rounded once. Gates are summed from token j backwards: in the difference of two sums over
// the whole ring a token that wipes the state would cost those after it their precision.
// Order of sums: that of `multiply` for S k, S q and the products of keys; then the checkpoint's part, the ring's
// tokens in ascending order, the token itself. Since S is formed at multiples of C alone, a token's bits do not depend
// on the calls that its sequence is cut into, on threads, or on the sequences beside it.
// Infinity and NaN in what a fold forms are seen as it is stored, for a comparison a vector, and told by the output of
// the token that the fold follows: NaN, in that value head.
#if defined(XGDN_CORE_KERNELS_CPU_REPLAY_GATED_DELTA_RULE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_REPLAY_GATED_DELTA_RULE_INL_H_
#undef XGDN_CORE_KERNELS_CPU_REPLAY_GATED_DELTA_RULE_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_REPLAY_GATED_DELTA_RULE_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/kernels/cpu/lane_sums-inl.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule-inl.h"
#include "core/kernels/cpu/replay_gated_delta_rule.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kAhead = 2048;  // bytes of S on their way while others are worked on

// Short rows that are read soon, fetched a share with each tile of S: a processor keeps few lines under way that it is
// told of.
class Fetches {
 public:
  void add(const void* begin, size_t bytes) {
    ranges_[count_++] = {static_cast<const char*>(begin), bytes};
    bytes_ += bytes;
  }

  // One of `shares` equal parts of all, in the order in which they were added.
  HWY_INLINE void fetch(size_t shares) {
    for (size_t left = bytes_ / shares + kLine; at_ < count_ && left > 0;) {
      Range& range = ranges_[at_];
      const size_t bytes = std::min(left, range.bytes);
      prefetch(range.begin, bytes);
      left -= bytes;
      range.begin += bytes;
      range.bytes -= bytes;
      if (range.bytes == 0) ++at_;
    }
  }

 private:
  static constexpr size_t kLine = 64;
  struct Range {
    const char* begin;
    size_t bytes;
  };
  Range ranges_[17];  // an item's: of a value head eight, of a key head nine
  size_t count_ = 0;
  size_t at_ = 0;
  size_t bytes_ = 0;
};

// ---- tokens in memory -----------------------------------------------------------------------------------------------

// A sequence and one of its key heads.
struct ReplayItem {
  int64_t n = 0;
  int64_t key_head = 0;
};

// The tokens of the op. Where it is one with what stands around it, other tokens have the same functions.
class TokensInMemory {
 public:
  explicit TokensInMemory(const ReplayGatedDeltaRuleArgs& args) : args_(args) {}

  // Heads fastest: what follows lies behind it in the pool.
  ReplayItem item(int64_t index) const { return {index / args_.H, index % args_.H}; }

  // Widened, before any norm.
  void load_keys(int64_t token, int64_t key_head, float* k, float* q) const {
    load_row(args_.k.dtype, args_.k.at(token, key_head), args_.K, k);
    load_row(args_.q.dtype, args_.q.at(token, key_head), args_.K, q);
  }
  void load_value(int64_t token, int64_t h, float* v) const {
    load_row(args_.v.dtype, args_.v.at(token, h), args_.V, v);
  }
  TokenGates gates(int64_t token, int64_t h) const {
    return {load_scalar(args_.g.dtype, args_.g.at(token, h)), load_scalar(args_.beta.dtype, args_.beta.at(token, h))};
  }
  void store(int64_t token, int64_t h, const float* o) const {
    store_row(args_.out.dtype, o, args_.V, args_.out.at(token, h));
  }

  // What the functions above read and write of a token.
  void add_keys(int64_t token, int64_t key_head, Fetches& ahead) const {
    const auto bytes = static_cast<size_t>(args_.K * size_of(args_.k.dtype));
    ahead.add(args_.k.at(token, key_head), bytes);
    ahead.add(args_.q.at(token, key_head), bytes);
  }
  void add_value(int64_t token, int64_t h, Fetches& ahead) const {
    ahead.add(args_.v.at(token, h), static_cast<size_t>(args_.V * size_of(args_.v.dtype)));
    ahead.add(args_.out.at(token, h), static_cast<size_t>(args_.V * size_of(args_.out.dtype)));
  }

 private:
  const ReplayGatedDeltaRuleArgs& args_;
};

// What an item reads and writes beside S for the first token of a call: a share with each of its value heads, by which
// the item before it fetches them. The ring of all heads is read before the first of them is computed.
template <class Tokens>
void add_share(const ReplayGatedDeltaRuleArgs& args, const Tokens& tokens, ReplayItem item, int64_t head,
               Fetches& ahead) {
  if (args.state.read[item.n] < 0 || num_tokens(args, item.n) == 0) return;
  const auto rows = static_cast<size_t>(first_length(args, item.n)) + 1;
  const int64_t token = token_begin(args, item.n);
  const int32_t slot = args.ring.read[item.n];
  if (head == 0) {
    tokens.add_keys(token, item.key_head, ahead);
    ahead.add(args.ring.keys(slot, item.key_head, args.K), rows * static_cast<size_t>(args.K) * sizeof(float));
  }
  const int64_t h = item.key_head * (args.HV / args.H) + head;
  ahead.add(args.ring.gates(slot, h), rows * sizeof(float));
  ahead.add(args.ring.updates(slot, h, args.V), rows * static_cast<size_t>(args.V) * sizeof(float));
  tokens.add_value(token, h, ahead);
}

// ---- a work item ----------------------------------------------------------------------------------------------------

// logs[i] = log D_ji of `row` tokens before one with gate g; returns log D_j0.
HWY_INLINE double sum_gates(const float* HWY_RESTRICT gates, size_t row, float g, float* HWY_RESTRICT logs) {
  double sum = static_cast<double>(g);
  for (size_t i = row; i-- > 0; sum += static_cast<double>(gates[i])) logs[i] = static_cast<float>(sum);
  return sum;
}

// A value head of the work item.
template <typename State>
struct ValueHead {
  int64_t h = 0;
  const State* S = nullptr;     // [V, K]  the checkpoint; null: zero
  const State* kept = nullptr;  // likewise, without what drafts have been folded into
  float* u = nullptr;           // [R, V]  as the ring
  float* g = nullptr;           // [R]
};

// A work item with its tokens since the checkpoint in scratch memory: `length` of them, in the order of the ring.
template <typename State>
struct Replay {
  const ReplayGatedDeltaRuleArgs& args;
  int64_t n = 0, key_head = 0;
  ReplayItem following;         // the item that comes next
  const State* next = nullptr;  // its first checkpoint; null: unknown

  size_t length = 0;
  size_t unwritten = 0;  // the first that the ring lacks
  int64_t ring_row = 0;  // where the ring has token 0

  ValueHead<State>* heads = nullptr;
  size_t num_heads = 0;

  // In the natural order of K; `ordered_*` in the pool's.
  float* k = nullptr;          // [R, K]
  float* q = nullptr;          // [C, K]  of the tokens that are worked on
  float* ordered_k = nullptr;  // [R, K]
  float* ordered_q = nullptr;  // [C, K]
  float* kk = nullptr;         // [C, R]  k_i . k_j
  float* kq = nullptr;         // [C, R]  k_i . q_j
  float* sk = nullptr;         // [C, V]
  float* sq = nullptr;         // [C, V]
  float* v = nullptr;          // [V]
  float* o = nullptr;          // [V]
  float* logs = nullptr;       // [R]
  float* weights = nullptr;    // [2, R]
  float* w = nullptr;          // [C, V]
  State* folded = nullptr;     // [heads, V, K]  checkpoints that are not kept

  size_t C() const { return static_cast<size_t>(args.C); }
  size_t R() const { return padded(args.ring.R); }
  size_t K() const { return static_cast<size_t>(args.K); }
  size_t V() const { return static_cast<size_t>(args.V); }
  // The checkpoint that is read after that of a head.
  const State* after(size_t head) const { return head + 1 == num_heads ? next : heads[head + 1].S; }
  // Where the checkpoint of a head goes.
  State* written(size_t head) const {
    return args.state.template slot<State>(args.state.write[n]) + heads[head].h * args.V * args.K;
  }
  bool is_written() const { return cpu::is_written(args, n); }
};

// ---- the ring -------------------------------------------------------------------------------------------------------

template <typename State>
void order_key(Replay<State>& r, size_t row) {
  if (r.ordered_k == r.k) return;
  std::copy_n(r.k + row * r.K(), r.K(), r.ordered_k + row * r.K());
  to_pool_order<State>(r.ordered_k + row * r.K(), r.K());
}

template <typename State>
void read_ring(Replay<State>& r) {
  const int32_t slot = r.args.ring.read[r.n];
  r.length = static_cast<size_t>(first_length(r.args, r.n));
  r.unwritten = slot == r.args.ring.write[r.n] ? r.length : 0;
  if (r.length == 0) return;
  const RingView& ring = r.args.ring;
  std::copy_n(ring.keys(slot, r.key_head, r.args.K), r.length * r.K(), r.k);
  for (size_t row = 0; row < r.length; ++row) order_key(r, row);
  for (size_t i = 0; i < r.num_heads; ++i) {
    std::copy_n(ring.updates(slot, r.heads[i].h, r.args.V), r.length * r.V(), r.heads[i].u);
    std::copy_n(ring.gates(slot, r.heads[i].h), r.length, r.heads[i].g);
  }
}

template <typename State>
void write_ring(Replay<State>& r) {
  const size_t first = r.unwritten, count = r.length - r.unwritten;
  const size_t to = static_cast<size_t>(r.ring_row) + first;
  const RingView& ring = r.args.ring;
  const int32_t slot = ring.write[r.n];
  r.unwritten = r.length;
  if (count == 0 || !r.is_written()) return;
  std::copy_n(r.k + first * r.K(), count * r.K(), ring.keys(slot, r.key_head, r.args.K) + to * r.K());
  for (size_t i = 0; i < r.num_heads; ++i) {
    const ValueHead<State>& head = r.heads[i];
    std::copy_n(head.u + first * r.V(), count * r.V(), ring.updates(slot, head.h, r.args.V) + to * r.V());
    std::copy_n(head.g + first, count, ring.gates(slot, head.h) + to);
  }
}

// Forgets the first C tokens, which a fold has put into S.
template <typename State>
void drop_folded(Replay<State>& r) {
  const size_t C = r.C(), left = r.length - C;
  r.length = left;
  r.unwritten = 0;
  if (left == 0) return;
  std::copy_n(r.k + C * r.K(), left * r.K(), r.k);
  if (r.ordered_k != r.k) std::copy_n(r.ordered_k + C * r.K(), left * r.K(), r.ordered_k);
  for (size_t i = 0; i < r.num_heads; ++i) {
    std::copy_n(r.heads[i].u + C * r.V(), left * r.V(), r.heads[i].u);
    std::copy_n(r.heads[i].g + C, left, r.heads[i].g);
  }
}

// ---- the fold -------------------------------------------------------------------------------------------------------

// Lanes that a State can hold: neither NaN nor, rounded, infinite.
template <typename State>
HWY_INLINE hn::Mask<F32> is_finite(VF x) {
  constexpr float kLargest = sizeof(State) == sizeof(float) ? std::numeric_limits<float>::max() : 0x1.fefffep127f;
  return hn::Le(hn::Abs(x), hn::Set(F32(), kLargest));
}

// 4 rows of D S + sum_c w_c k_c^T, of two vectors of K as load_pair reads them, or of one. Clears lanes of `all_finite`
// where a State cannot hold what they form.
template <bool kIsPair, typename State>
HWY_INLINE void fold_vectors(const State* src, State* dst, size_t K, size_t count, size_t V, const Decay& decay,
                             const float* HWY_RESTRICT w, const float* HWY_RESTRICT k, hn::Mask<F32>& all_finite) {
  const F32 d;
  const auto read = [&](size_t row, VF& a, VF& b) HWY_ATTR {
    a = b = hn::Zero(d);
    if (src == nullptr) return;
    if constexpr (kIsPair) {
      load_pair(d, src + row * K, a, b);
    } else {
      a = load(d, src + row * K);
    }
  };
  VF a0, a1, a2, a3, b0, b1, b2, b3;
  const auto start = [&](size_t row, VF& a, VF& b) HWY_ATTR {
    read(row, a, b);
    a = hn::Mul(a, hn::Set(d, decay.factor));
    b = hn::Mul(b, hn::Set(d, decay.factor));
  };
  start(0, a0, b0);
  start(1, a1, b1);
  start(2, a2, b2);
  start(3, a3, b3);
  for (size_t c = 0; c < count; ++c, w += V, k += K) {
    VF first = hn::LoadU(d, k);
    VF second = first;
    if constexpr (kIsPair) second = hn::LoadU(d, k + hn::Lanes(d));
    keep_in_register(first);
    keep_in_register(second);
    const auto add = [&](size_t row, VF& a, VF& b) HWY_ATTR {
      const VF factor = hn::Set(d, w[row]);
      a = hn::MulAdd(factor, first, a);
      if constexpr (kIsPair) b = hn::MulAdd(factor, second, b);
    };
    add(0, a0, b0);
    add(1, a1, b1);
    add(2, a2, b2);
    add(3, a3, b3);
  }
  const auto write = [&](size_t row, VF a, VF b) HWY_ATTR {
    if (decay.is_near) {
      VF s, t;
      read(row, s, t);
      a = hn::Add(s, a);
      b = hn::Add(t, b);
    }
    all_finite = hn::And(all_finite, is_finite<State>(a));
    if constexpr (kIsPair) {
      all_finite = hn::And(all_finite, is_finite<State>(b));
      store_pair(d, a, b, dst + row * K);
    } else {
      store_rounded(d, a, dst + row * K);
    }
  };
  write(0, a0, b0);
  write(1, a1, b1);
  write(2, a2, b2);
  write(3, a3, b3);
}

// dst <- D S + sum_i D_i u_i k_i^T after the first `count` > 0 tokens. dst may be S. k [count, K] is in the pool's
// order; w [count, V] and logs are scratch memory. What is worked on next is fetched meanwhile. False where dst is not
// finite.
template <typename State>
bool fold(const State* S, size_t count, const float* HWY_RESTRICT k, const float* HWY_RESTRICT g,
          const float* HWY_RESTRICT u, size_t K, size_t V, float* HWY_RESTRICT w, float* HWY_RESTRICT logs, State* dst,
          const State* next) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const Decay decay = make_decay(sum_gates(g, count, 0.0f, logs));  // which comes back at every fold: in double
  for (size_t c = 0; c < count; c += lanes) hn::StoreU(exp(d, hn::LoadU(d, logs + c)), d, logs + c);
  for (size_t c = 0; c < count; ++c) {
    const VF factor = hn::Set(d, logs[c]);
    for (size_t i = c * V; i < (c + 1) * V; i += lanes) hn::StoreU(hn::Mul(factor, hn::LoadU(d, u + i)), d, w + i);
  }
  hn::Mask<F32> all_finite = hn::FirstN(d, lanes);
  for (size_t row = 0; row < V; row += kRows) {
    if (next != nullptr) prefetch(next + row * K, kRows * K * sizeof(State));
    const auto src = [&](size_t i) { return S == nullptr ? nullptr : S + row * K + i; };
    State* to = dst + row * K;
    size_t i = 0;
    for (; i + 2 * lanes <= K; i += 2 * lanes) {
      fold_vectors<true>(src(i), to + i, K, count, V, decay, w + row, k + i, all_finite);
    }
    if (i < K) fold_vectors<false>(src(i), to + i, K, count, V, decay, w + row, k + i, all_finite);
  }
  return hn::AllTrue(d, all_finite);
}

// Forms S of the first C tokens, in the slot to be written or, where it is not to be kept, in scratch memory. False
// where it is not finite.
template <typename State>
bool fold_head(Replay<State>& r, size_t index, bool is_kept) {
  ValueHead<State>& head = r.heads[index];
  const size_t elements = r.V() * r.K();
  State* dst = is_kept && r.is_written() ? r.written(index) : r.folded + index * elements;
  const State* const S = std::exchange(head.S, dst);
  if (is_kept) head.kept = dst;
  return fold(S, r.C(), r.ordered_k, head.g, head.u, r.K(), r.V(), r.w, r.logs, dst, r.after(index));
}

// ---- tokens ---------------------------------------------------------------------------------------------------------

// k, q and their products with the keys of the ring, for `count` tokens from `first`.
template <typename State, class Tokens>
void stage_keys_of(Replay<State>& r, Tokens& tokens, int64_t first, size_t count) {
  const size_t K = r.K(), R = r.R();
  for (size_t t = 0; t < count; ++t) {
    const size_t row = r.length + t;
    float* k = r.k + row * K;
    float* q = r.q + t * K;
    tokens.load_keys(first + static_cast<int64_t>(t), r.key_head, k, q);
    stage_keys<float>(k, q, K, r.args.normalise_qk);
    order_key(r, row);
    if (r.ordered_q != r.q) {
      std::copy_n(q, K, r.ordered_q + t * K);
      to_pool_order<State>(r.ordered_q + t * K, K);
    }
    for (size_t i = 0; i <= row; i += kRows) {
      Products products;
      multiply(StoredRows<float>{r.k + i * K, K}, K, k, q, products);
      std::copy_n(products.sk, kRows, r.kk + t * R + i);
      std::copy_n(products.sq, kRows, r.kq + t * R + i);
    }
  }
}

constexpr size_t kUsualDim = 128;

// Whether k and q fit into half of the registers, 32 of 16 lanes.
HWY_INLINE bool is_swept([[maybe_unused]] size_t K) {
#ifdef XGDN_HARDWARE_BFLOAT16
  return K == kUsualDim;
#else
  return false;
#endif
}

#ifdef XGDN_HARDWARE_BFLOAT16

// S k and S q of kTile rows, one row after the other as they lie in memory: processors see that and read ahead by
// themselves, further than they can be told to. From memory a head of f32 takes 3.5 us instead of 5.2 (Zen 4).
template <typename State>
HWY_INLINE void sweep_rows(const State* S, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q,
                           float* HWY_RESTRICT sk, float* HWY_RESTRICT sq) {
  const F32 d;
  constexpr size_t kVectors = kUsualDim / kMaxLanes;
  static_assert(kTile == kMaxLanes);
  alignas(64) float k_lanes[kTile * kMaxLanes], q_lanes[kTile * kMaxLanes];
  VF ks[kVectors], qs[kVectors];
#pragma GCC unroll 8
  for (size_t i = 0; i < kVectors; ++i) {
    ks[i] = hn::LoadU(d, k + i * kMaxLanes);
    qs[i] = hn::LoadU(d, q + i * kMaxLanes);
  }
  for (size_t row = 0; row < kTile; ++row) {
    VF k_sum = hn::Zero(d), q_sum = k_sum;
#pragma GCC unroll 4
    for (size_t i = 0; i < kVectors; i += 2) {
      VF s, t;
      load_pair(d, S + row * kUsualDim + i * kMaxLanes, s, t);
      k_sum = add_products(s, t, ks[i], ks[i + 1], k_sum);
      q_sum = add_products(s, t, qs[i], qs[i + 1], q_sum);
    }
    hn::Store(k_sum, d, k_lanes + row * kMaxLanes);
    hn::Store(q_sum, d, q_lanes + row * kMaxLanes);
  }
  sum_lanes_of_sixteen(k_lanes, kMaxLanes, sk);
  sum_lanes_of_sixteen(q_lanes, kMaxLanes, sq);
}

#endif

// S k and S q of a token on kTile rows.
template <typename State>
HWY_INLINE void multiply_tile(const State* S, size_t K, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q,
                              float* HWY_RESTRICT sk, float* HWY_RESTRICT sq) {
#ifdef XGDN_HARDWARE_BFLOAT16
  if (is_swept(K)) return sweep_rows(S, k, q, sk, sq);
#endif
  for (size_t row = 0; row < kTile; row += kRows) {
    Products products;
    multiply(StoredRows<State>{S + row * K, K}, K, k, q, products);
    std::copy_n(products.sk, kRows, sk + row);
    std::copy_n(products.sq, kRows, sq + row);
  }
}

// S k and S q of `count` tokens. `ahead` is fetched meanwhile; S too, and past its last row `next`, unless the
// processor does it.
template <typename State>
void read_checkpoint(Replay<State>& r, const State* S, size_t count, const State* next, Fetches& ahead) {
  const size_t K = r.K(), V = r.V();
  if (S == nullptr) {
    std::fill_n(r.sk, count * V, 0.0f);
    std::fill_n(r.sq, count * V, 0.0f);
    return;
  }
  for (size_t tile = 0; tile < V; tile += kTile) {
    if (!is_swept(K)) prefetch_ahead(S, V * K, tile * K, kTile * K, kAhead, next);
    ahead.fetch(V / kTile);
    for (size_t t = 0; t < count; ++t) {
      multiply_tile(S + tile * K, K, r.ordered_k + (r.length + t) * K, r.ordered_q + t * K, r.sk + t * V + tile,
                    r.sq + t * V + tile);
    }
  }
}

// u and o of the token at `row` of the ring, from what stands before it.
template <typename State>
void replay_token(Replay<State>& r, ValueHead<State>& head, size_t t, size_t row, const TokenGates& gates) {
  const F32 d;
  const size_t lanes = hn::Lanes(d), V = r.V();
  const float* HWY_RESTRICT kk = r.kk + t * r.R();
  const float* HWY_RESTRICT kq = r.kq + t * r.R();
  float* HWY_RESTRICT to_u = r.weights;
  float* HWY_RESTRICT to_o = r.weights + r.R();
  const double log_decay = sum_gates(head.g, row, gates.g, r.logs);
  head.g[row] = gates.g;
  for (size_t i = 0; i < row; i += lanes) {
    const VF decay = exp(d, hn::LoadU(d, r.logs + i));
    hn::StoreU(hn::Mul(decay, hn::LoadU(d, kk + i)), d, to_u + i);
    hn::StoreU(hn::Mul(decay, hn::LoadU(d, kq + i)), d, to_o + i);
  }
  const VF decay = exp(d, hn::Set(d, static_cast<float>(log_decay)));
  const float* HWY_RESTRICT sk = r.sk + t * V;
  const float* HWY_RESTRICT sq = r.sq + t * V;
  for (size_t i = 0; i < V; i += lanes) {
    VF known = hn::Mul(decay, hn::LoadU(d, sk + i));
    VF read = hn::Mul(decay, hn::LoadU(d, sq + i));
    const float* HWY_RESTRICT u = head.u + i;
    for (size_t j = 0; j < row; ++j, u += V) {
      const VF uj = hn::LoadU(d, u);
      known = hn::MulAdd(hn::Set(d, to_u[j]), uj, known);
      read = hn::MulAdd(hn::Set(d, to_o[j]), uj, read);
    }
    const VF write = hn::Mul(hn::Set(d, gates.beta), hn::Sub(hn::LoadU(d, r.v + i), known));
    hn::StoreU(write, d, head.u + row * V + i);
    read = hn::MulAdd(hn::Set(d, kq[row]), write, read);
    hn::StoreU(hn::Mul(hn::Set(d, r.args.scale), read), d, r.o + i);
  }
}

// `count` tokens from `first`, none of which is behind the next fold. With `folds` they fill the ring.
template <typename State, class Tokens>
void replay_tokens(Replay<State>& r, Tokens& tokens, int64_t first, size_t count, bool folds) {
  stage_keys_of(r, tokens, first, count);
  for (size_t i = 0; i < r.num_heads; ++i) {
    ValueHead<State>& head = r.heads[i];
    Fetches ahead;
    if (r.next != nullptr) add_share(r.args, tokens, r.following, static_cast<int64_t>(i), ahead);
    read_checkpoint(r, head.S, count, r.after(i), ahead);
    for (size_t t = 0; t < count; ++t) {
      const int64_t token = first + static_cast<int64_t>(t);
      tokens.load_value(token, head.h, r.v);
      replay_token(r, head, t, r.length + t, tokens.gates(token, head.h));
      tokens.store(token, head.h, r.o);
    }
    if (folds && !fold_head(r, i, r.args.commit)) {
      std::fill_n(r.o, r.V(), std::numeric_limits<float>::quiet_NaN());
      tokens.store(first + static_cast<int64_t>(count) - 1, head.h, r.o);
    }
  }
  r.length += count;
}

// What no fold has written: the checkpoint of a sequence that starts, or one that moves to another slot.
template <typename State>
void write_checkpoints(const Replay<State>& r) {
  const size_t bytes = r.V() * r.K() * sizeof(State);
  for (size_t i = 0; i < r.num_heads; ++i) {
    const State* kept = r.heads[i].kept;
    if (kept == nullptr) {
      std::memset(r.written(i), 0, bytes);
    } else if (kept != r.written(i)) {
      std::memcpy(r.written(i), kept, bytes);
    }
  }
}

template <typename State, class Tokens>
void run_sequence(Replay<State>& r, Tokens& tokens, int64_t begin, int64_t end) {
  const bool commit = r.args.commit;
  read_ring(r);
  if (r.length >= r.C()) {  // after a verification
    for (size_t i = 0; i < r.num_heads; ++i) fold_head(r, i, /*is_kept=*/true);
    drop_folded(r);
  }
  for (int64_t token = begin; token < end;) {
    const auto room = static_cast<int64_t>(r.C() - r.length);
    const int64_t count = std::min(room, end - token);
    const bool folds = count == room && (commit || token + count < end);
    replay_tokens(r, tokens, token, static_cast<size_t>(count), folds);
    token += count;
    if (!folds) break;
    if (!commit) {  // the ring keeps the tokens: nobody has accepted them
      write_ring(r);
      r.ring_row += static_cast<int64_t>(r.C());
    }
    drop_folded(r);
  }
  write_ring(r);
  if (r.is_written()) write_checkpoints(r);
}

template <typename State>
const State* checkpoint(const ReplayGatedDeltaRuleArgs& args, int64_t n, int64_t h) {
  const bool has_state = args.has_initial_state == nullptr || args.has_initial_state[n];
  const int32_t slot = args.state.read[n];
  return has_state && slot >= 0 ? args.state.slot<State>(slot) + h * args.V * args.K : nullptr;
}

inline void write_zeros(const ReplayGatedDeltaRuleArgs& args, int64_t n, int64_t h) {
  const int64_t begin = token_begin(args, n);
  for (int64_t token = begin; token < begin + num_tokens(args, n); ++token) {
    std::memset(args.out.at(token, h), 0, static_cast<size_t>(args.V * size_of(args.out.dtype)));
  }
}

template <typename State, class Tokens>
void run_items(const ReplayGatedDeltaRuleArgs& args, Tokens& tokens, int64_t begin_item, int64_t end_item) {
  constexpr bool kHasOrder = sizeof(State) != sizeof(float);
  const int64_t shared = args.HV / args.H;
  Replay<State> r{.args = args};
  const size_t C = r.C(), R = r.R(), K = r.K(), V = r.V();
  const auto num_heads = static_cast<size_t>(shared);
  std::vector<ValueHead<State>> heads(num_heads);
  r.heads = heads.data();
  r.num_heads = num_heads;
  const size_t keys = (R + C) * K;
  const size_t floats = (kHasOrder ? 2 : 1) * keys + 2 * C * R + 3 * C * V + 2 * V + 3 * R + num_heads * R * (V + 1);
  float* at = scratch<Replay<State>>(floats + num_heads * V * K);
  const auto take = [&](size_t count) { return std::exchange(at, at + count); };
  r.k = take(R * K);
  r.q = take(C * K);
  r.ordered_k = kHasOrder ? take(R * K) : r.k;
  r.ordered_q = kHasOrder ? take(C * K) : r.q;
  r.kk = take(C * R);
  r.kq = take(C * R);
  r.sk = take(C * V);
  r.sq = take(C * V);
  r.v = take(V);
  r.o = take(V);
  r.logs = take(R);
  r.weights = take(2 * R);
  r.w = take(C * V);
  for (ValueHead<State>& head : heads) {
    head.u = take(R * V);
    head.g = take(R);
  }
  r.folded = reinterpret_cast<State*>(at);

  for (int64_t index = begin_item; index < end_item; ++index) {
    const auto [n, key_head] = tokens.item(index);
    r.n = n;
    r.key_head = key_head;
    r.ring_row = 0;
    for (int64_t i = 0; i < shared; ++i) {
      const int64_t h = r.key_head * shared + i;
      heads[static_cast<size_t>(i)].h = h;
      heads[static_cast<size_t>(i)].S = heads[static_cast<size_t>(i)].kept = checkpoint<State>(args, r.n, h);
      if (args.state.read[r.n] < 0) write_zeros(args, r.n, h);
    }
    if (args.state.read[r.n] < 0) continue;
    r.following = tokens.item(index + 1);
    r.next = index + 1 < end_item ? checkpoint<State>(args, r.following.n, r.following.key_head * shared) : nullptr;
    const int64_t begin = token_begin(args, n);
    run_sequence(r, tokens, begin, begin + num_tokens(args, n));
  }
}

// Work items of any tokens.
template <class Tokens>
void replay_items(const ReplayGatedDeltaRuleArgs& args, Tokens& tokens, int64_t begin, int64_t end) {
  with_state_type(args.state.dtype, [&](auto element) { run_items<decltype(element)>(args, tokens, begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_REPLAY_GATED_DELTA_RULE_INL_H_
