// SPDX-License-Identifier: Apache-2.0
// Gated delta rule, token by token: recurrent_gated_delta_rule and packed_decode. Several tokens pass through tiles of
// state rows that stay in the first-level cache. The maths, its rounding and the order of its sums:
// recurrent_gated_delta_rule-inl.h.
//
//            K ->            Loop: sequence, value head, block of V rows (a work item) -> chunk of tokens -> tile of
//        +---------+         rows -> token -> 4 rows -> K lanes.
//        | row . k | -> u    A single token needs no tile: 4 rows are read, both products taken, and written.
//   V    | row . q | -> o    A verification reads the slot of the token before and writes the token's own.
//   |    +---------+
//
// Rounding: S is rounded to its own type where it is written: after each token of a verification, whose bits are those
// of decode token by token, otherwise after the call's last token. q, k, v are widened exactly; the norms, k.q and the
// gates are f32; o is rounded to its type once.
#include "core/kernels/cpu/recurrent_gated_delta_rule.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/recurrent_gated_delta_rule.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/recurrent_gated_delta_rule-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr size_t kChunk = 64;  // tokens staged at once: with K = 128 their k and q fill 64 KiB

// Tokens of one work item in f32, staged in scratch memory.
struct Chunk {
  float* k;  // [kChunk, K]
  float* q;  // [kChunk, K]
  float* v;  // [kChunk, v_block]
  float* o;  // [kChunk, v_block]
  float* S;  // [v_block, K]
  Token tokens[kChunk];
};

// A work item: rows [v_begin, v_begin + num_rows) of value head h of sequence n.
struct Item {
  int64_t n, h;
  int64_t v_begin, num_rows;
  int64_t begin, end;  // tokens
};

template <typename State>
State* state_rows(const RecurrentGatedDeltaRuleArgs& args, const Item& item, int32_t slot) {
  return args.state.slot<State>(slot) + (item.h * args.V + item.v_begin) * args.K;
}

// Stages up to kChunk tokens from `first`; returns how many.
template <typename State>
size_t stage(const RecurrentGatedDeltaRuleArgs& args, const Item& item, int64_t first, Chunk& c) {
  const size_t count = std::min<int64_t>(kChunk, item.end - first);
  const int64_t key_head = item.h / (args.HV / args.H);
  const int64_t v_offset = item.v_begin * size_of(args.v.dtype);
  for (size_t t = 0; t < count; ++t) {
    float* k = c.k + t * args.K;
    float* q = c.q + t * args.K;
    float* v = c.v + t * args.v_block;
    load_row(args.k.dtype, args.k.at(first + t, key_head), args.K, k);
    load_row(args.q.dtype, args.q.at(first + t, key_head), args.K, q);
    load_row(args.v.dtype, static_cast<const char*>(args.v.at(first + t, item.h)) + v_offset, item.num_rows, v);
    Token& token = c.tokens[t];
    token.k = k;
    token.q = q;
    token.v = v;
    token.o = c.o + t * args.v_block;
    token.kq = stage_keys<State>(k, q, args.K, args.normalise_qk);
    token.scale = args.scale;
    stage_gates(load_gates(args, first + t, item.h), token);
  }
  return count;
}

void* out_rows(const RecurrentGatedDeltaRuleArgs& args, const Item& item, int64_t token) {
  return static_cast<char*>(args.out.at(token, item.h)) + item.v_begin * size_of(args.out.dtype);
}

void write_outputs(const RecurrentGatedDeltaRuleArgs& args, const Item& item, int64_t first, size_t count,
                   const Chunk& c) {
  for (size_t t = 0; t < count; ++t) {
    store_row(args.out.dtype, c.tokens[t].o, item.num_rows, out_rows(args, item, first + t));
  }
}

// The chunk's tokens through 16 rows: they are read from src and written to dst(t) after token t, which the next token
// reads. `first_row` is their place in v and o.
template <typename State, class Dst>
void step_tile(const Chunk& c, size_t count, size_t first_row, size_t K, const State* src, const Dst& dst) {
  HWY_ALIGN float u[kTile];
  Products products;
  for (size_t row = 0; row < kTile; row += kRows) {
    multiply(StoredRows<State>{src + row * K, K}, K, c.tokens[0].k, c.tokens[0].q, products);
    read_out(products, c.tokens[0], first_row + row, u + row);
  }
  for (size_t t = 1; t < count; ++t) {
    State* to = dst(t - 1);
    for (size_t row = 0; row < kTile; row += kRows) {
      write_and_multiply(c.tokens[t - 1], u + row, src + row * K, to + row * K, K, c.tokens[t], products);
      read_out(products, c.tokens[t], first_row + row, u + row);
    }
    src = to;
  }
  State* to = dst(count - 1);
  for (size_t row = 0; row < kTile; row += kRows) {
    write(c.tokens[count - 1], u + row, src + row * K, to + row * K, K);
  }
}

// Between a pool and f32 rows in the pool's order.
template <typename Src, typename Dst>
void copy_rows(const Src* src, Dst* dst, size_t num_rows, size_t K) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  VF s, t;
  for (size_t row = 0; row < num_rows; ++row, src += K, dst += K) {
    size_t i = 0;
    for (; i + 2 * lanes <= K; i += 2 * lanes) {
      load_pair(d, src + i, s, t);
      store_pair(d, s, t, dst + i);
    }
    if (i < K) store(d, load(d, src + i), dst + i);
  }
}

// Any number of tokens, none included: the state is widened to c.S, advanced there, and written at the end.
template <typename State>
void step_sequence(const RecurrentGatedDeltaRuleArgs& args, const Item& item, const State* src, Chunk& c) {
  const size_t K = args.K;
  copy_rows(src, c.S, item.num_rows, K);
  for (int64_t token = item.begin; token < item.end; token += kChunk) {
    const size_t count = stage<State>(args, item, token, c);
    for (size_t row = 0; row < static_cast<size_t>(item.num_rows); row += kTile) {
      float* tile = c.S + row * K;
      step_tile<float>(c, count, row, K, tile, [tile](size_t) { return tile; });
    }
    write_outputs(args, item, token, count, c);
  }
  const int32_t slot = args.state.write[item.n];
  if (slot >= 0) copy_rows(c.S, state_rows<State>(args, item, slot), item.num_rows, K);
}

// Each token's state goes straight to its slot; one without a slot goes to c.S, from where the next token reads it.
template <typename State>
void verify_sequence(const RecurrentGatedDeltaRuleArgs& args, const Item& item, const State* src, Chunk& c) {
  const int32_t* slots = args.state.read + item.n * args.L;
  const auto rows_after = [&](int64_t token) {
    const int32_t slot = slots[token - item.begin];
    return slot >= 0 ? state_rows<State>(args, item, slot) : reinterpret_cast<State*>(c.S);
  };
  for (int64_t token = item.begin; token < item.end; token += kChunk) {
    const size_t count = stage<State>(args, item, token, c);
    for (size_t row = 0; row < static_cast<size_t>(item.num_rows); row += kTile) {
      const size_t tile = row * args.K;
      step_tile(c, count, row, args.K, src + tile, [&](size_t t) { return rows_after(token + t) + tile; });
    }
    write_outputs(args, item, token, count, c);
    src = rows_after(token + count - 1);
  }
}

template <typename State>
void step_token(const RecurrentGatedDeltaRuleArgs& args, const Item& item, const State* src, const void* next,
                Chunk& c) {
  prefetch(src, kPrefetchBytes);  // while the token is staged
  stage<State>(args, item, item.begin, c);
  const int32_t slot = args.num_accepted != nullptr ? args.state.read[item.n * args.L] : args.state.write[item.n];
  State* dst = slot >= 0 ? state_rows<State>(args, item, slot) : nullptr;
  step(c.tokens[0], src, dst, item.num_rows, args.K, next);
  write_outputs(args, item, item.begin, 1, c);
}

Item make_item(const RecurrentGatedDeltaRuleArgs& args, int64_t index) {
  const int64_t blocks = (args.V + args.v_block - 1) / args.v_block;
  Item item;
  item.n = index / (blocks * args.HV);
  item.h = index / blocks % args.HV;
  item.v_begin = index % blocks * args.v_block;
  item.num_rows = std::min(args.v_block, args.V - item.v_begin);
  item.begin = args.cu_seqlens != nullptr ? args.cu_seqlens[item.n] : item.n;
  item.end = args.cu_seqlens != nullptr ? args.cu_seqlens[item.n + 1] : item.n + 1;
  return item;
}

int32_t read_slot(const RecurrentGatedDeltaRuleArgs& args, const Item& item) {
  const int64_t column = args.num_accepted != nullptr ? args.num_accepted[item.n] - 1 : 0;
  return args.state.read[item.n * args.L + column];
}

// The rows that an item reads; null: padding.
template <typename State>
const State* source_rows(const RecurrentGatedDeltaRuleArgs& args, const Item& item) {
  const int32_t slot = read_slot(args, item);
  return slot >= 0 ? state_rows<State>(args, item, slot) : nullptr;
}

template <typename State>
void run_item(const RecurrentGatedDeltaRuleArgs& args, const Item& item, const void* next, Chunk& c) {
  const State* src = source_rows<State>(args, item);
  if (src == nullptr) {
    for (int64_t t = item.begin; t < item.end; ++t) {
      std::memset(out_rows(args, item, t), 0, item.num_rows * size_of(args.out.dtype));
    }
    return;
  }
  if (item.end - item.begin == 1) {
    step_token(args, item, src, next, c);
  } else if (args.num_accepted != nullptr) {
    verify_sequence(args, item, src, c);
  } else {
    step_sequence(args, item, src, c);
  }
}

template <typename State>
void run_items(const RecurrentGatedDeltaRuleArgs& args, int64_t begin, int64_t end) {
  const size_t keys = kChunk * args.K;
  const size_t values = kChunk * args.v_block;
  Chunk c;
  c.k = scratch<Chunk>(2 * keys + 2 * values + args.v_block * args.K);
  c.q = c.k + keys;
  c.v = c.q + keys;
  c.o = c.v + values;
  c.S = c.o + values;
  for (int64_t index = begin; index < end; ++index) {
    const State* next = index + 1 < end ? source_rows<State>(args, make_item(args, index + 1)) : nullptr;
    run_item<State>(args, make_item(args, index), next, c);
  }
}

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleArgs& args, int64_t begin, int64_t end) {
  with_state_type(args.state.dtype, [&](auto element) { run_items<decltype(element)>(args, begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(recurrent_gated_delta_rule);

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(recurrent_gated_delta_rule)(args, begin, end);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
