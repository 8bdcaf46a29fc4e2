// SPDX-License-Identifier: Apache-2.0
// Gated delta rule in chunks of C tokens, 32 or 64: chunk_gated_delta_rule. With b = cumsum g inside the chunk and
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
// exp(b_C) > 0.6 the state's step is S + (S expm1(b_C) + U^T K), rounded once, and in 64 tokens once.
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

#include "core/kernels/cpu/chunk_gates-inl.h"
#include "core/kernels/cpu/chunk_group-inl.h"
#include "core/kernels/cpu/chunk_keys-inl.h"
#include "core/kernels/cpu/chunk_state-inl.h"
#include "core/kernels/cpu/chunk_work-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

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
template <class M>
void prefetch_next(const ChunkGatedDeltaRuleArgs& args, const Item& item, int64_t token, int64_t index, int64_t total) {
  const int64_t next = (index + 1) % total;
  const int64_t groups = total / item.num_heads;
  const int64_t next_token = next > index ? token : token + M::kChunk;
  const int64_t next_end = std::min<int64_t>(next_token + M::kChunk, item.end);
  const int64_t column = next % groups * kGroup * kPanel;
  const int64_t size = std::min<int64_t>(kGroup * kPanel, item.num_panels * kPanel - column);
  prefetch_rows<0>(args.v, next_token, next_end, item.head + next / groups, item.v_begin + column, size);
  prefetch_rows<1>(args.out, next_token, next_end, item.head + next / groups, item.v_begin + column, size);
  const int64_t begin = token + M::kChunk + M::kChunk * index / total;
  const int64_t end = std::min<int64_t>(token + M::kChunk + M::kChunk * (index + 1) / total, item.end);
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
    take(w.kk, M::kSquare);
    take(w.qk, M::kSquare);
    take(w.A, M::kSquare);
    take(w.T, M::kSquare);
    take(w.below, (M::kBlocks - 1) * kBlock * kPanel);
    take(w.R, M::kGroupSize);
    take(w.o_state, M::kGroupSize);
    take(w.o_chunk, M::kGroupSize);
    take(w.change, M::kGroupSize);
    take(w.rows, M::kGroupSize);
    take(w.k_rows, M::kKeys * keys);
    take(w.q_rows, M::kKeys * keys);
    take(w.k_panels, M::kKeys * keys);
    take(w.k_columns, M::kKeys * w.K * M::kChunk);
    take(w.inverse, M::kInverse * M::kSquare);
    take(w.scores, M::kScores * M::kSquare);
    take(w.state, M::kState * w.state_part);
    take(w.errors, M::kErrors * M::kGroupSize);
    take(w.writes, M::kWrites * M::kGroupSize);
    take(w.updates, M::kUpdates * M::kGroupSize);
    take(w.has_rest, item.num_heads);
  };
  take_all();
  const size_t fixed = size;
  const size_t state = item.num_heads * item.num_panels * w.K * kPanel;
  memory = reinterpret_cast<char*>(scratch<Element>(fixed / sizeof(float) + (M::kKeepsRest ? 2 : 1) * state));
  take_all();
  std::memset(memory, 0, fixed);
  w.S = reinterpret_cast<float*>(memory + fixed);
  w.rest = M::kKeepsRest ? w.S + state : w.S;
}

// Of head i, at the chunk that begins at `token` of the call.
template <class M>
StateStep next_step(const Work<M>& w, int64_t i, int64_t token) {
  const bool has_rest = w.has_rest[i];
  w.has_rest[i] = M::kKeepsRest && w.gates.is_near && token % kStateTokens == 0;
  if (!w.gates.is_near) return StateStep::kDecayed;
  if (w.has_rest[i]) return StateStep::kNearToRest;
  return has_rest ? StateStep::kNearWithRest : StateStep::kNear;
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
      read_state(pool_rows<State>(args, item, args.state.read[item.n], item.head + i), panels, w.K, S);
    } else {
      std::fill_n(S, state_size, 0.0f);
    }
  }
  pack_states(item, w);
  for (int64_t token = item.begin; token < item.end; token += M::kChunk) {
    const size_t count = std::min<int64_t>(M::kChunk, item.end - token);
    const size_t rows = (count + M::kStrip - 1) / M::kStrip * M::kStrip;
    stage_keys(args, item.key_head, token, count, w);
    for (int64_t i = 0; i < item.num_heads; ++i) {
      const int64_t head = item.head + i;
      stage_head(args, head, token, count, rows, w);
      const StateStep step = next_step(w, i, token - item.begin);
      for (size_t panel = 0; panel < panels; panel += kGroup) {
        const Group group = {head,  item.v_begin + static_cast<int64_t>(panel * kPanel),
                             token, count,
                             rows,  std::min(kGroup, panels - panel),
                             step};
        prefetch_next<M>(args, item, token, i * groups + panel / kGroup, item.num_heads * groups);
        const size_t at = i * state_size + panel * w.K * kPanel;
        step_group(args, group, {w.S + at, w.rest + at, w.state + (i * panels + panel) * w.depth * kPanel}, w);
      }
    }
  }
  const int32_t slot = args.state.write[item.n];
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
  if (args.state.dtype == DType::kBFloat16) {
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
  if (args.state.read[item.n] < 0) {
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
