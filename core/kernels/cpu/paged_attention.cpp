// SPDX-License-Identifier: Apache-2.0
// Softmax attention of a block of tokens with the query heads that share a key head.
//
//               D ->                Rows: query heads of a token, then those of the next.
//          +---------+              Loop: tile of 128 rows of the context -> S = Q K^T -> P = exp(S - m) under the
//   rows   |    Q    |              running maximum m of each row -> O = exp(m' - m) O + P V, m' the maximum before.
//          +---------+              A tile is packed once for all rows, straight from the blocks that hold it.
//          +---------+
//   tile   |  K, V   |              Rounding: all is f32, out is rounded once. With bf16 products, which take q, k and
//          +---------+              v as they are, P is rounded to bf16, and the sum of its row with it. The products
//                                   take int8 as integers: their scales go to the columns of S and, once its rows are
//                                   summed, of P.
//
// A result depends on its query and on the rows that it sees, not on what is worked on beside it: tiles begin at
// multiples of 128 of the context; the sums of a row run over the context in order, and what it does not see has the
// weight zero, which adds nothing; where a value that some rows do not see is infinite or NaN, which times zero is NaN,
// the product gets zero in its place and those that see it add it by themselves.
#include "core/kernels/cpu/paged_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/paged_attention.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/attention_tile-inl.h"
#include "core/kernels/cpu/packed_product-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr float kNoScore = std::numeric_limits<float>::lowest();  // its weight is zero beside any score

template <class Element>
inline constexpr bool kIsBFloat16 = std::is_same_v<Element, uint16_t>;
// What the products take at once.
template <class Element>
inline constexpr size_t kDepthStep = kIsBFloat16<Element> ? 32 : 1;
template <class Element>
size_t row_step(const PagedAttentionArgs& args) {
  return kIsBFloat16<Element> ? args.products->row_step : 1;
}

inline size_t round_up(size_t n, size_t step) {
  return (n + step - 1) / step * step;
}

// Queries of a block of tokens with a key head; panels have 16 columns.
template <class Element>
struct Work {
  const PagedAttentionArgs& args;
  const AttentionBlock& block;
  int64_t head;
  size_t group;      // query heads
  size_t rows;       // tokens * group, padded for the products
  size_t width;      // D, padded
  size_t depth;      // of Q K^T: D, padded
  float* sums;       // [width / 16][rows, 16]  O
  float* scores;     // [128 / 16][rows, 16]     S
  float* largest;    // [rows]                  m
  float* totals;     // [rows]                  of P
  float* factors;    // [128]                   of the columns of S, which they make base 2
  float* scales;     // [128]                   of int8 rows of V
  float* unpacked;   // [2][16, depth]
  Element* queries;  // [rows, depth]           Q
  Element* weights;  // [rows, 128]             P
  Element* keys;     // [128 / 16][depth, 16]    K^T
  Element* values;   // [width / 16][128, 16]    V

  Work(const PagedAttentionArgs& call, const AttentionBlock& tokens, int64_t key_head)
      : args(call),
        block(tokens),
        head(key_head),
        group(static_cast<size_t>(call.HQ / call.HKV)),
        rows(round_up(num_queries(), row_step<Element>(call))),
        width(padded(call.D)),
        depth(round_up(width, kDepthStep<Element>)) {
    constexpr size_t kPerFloat = sizeof(float) / sizeof(Element);
    const size_t of_rows = round_up(rows, kMaxLanes);
    float* memory = scratch<Work>(rows * (width + kTile) + 2 * of_rows + 2 * kTile + 2 * kPanel * depth +
                                  (of_rows * (depth + kTile) + kTile * (depth + width)) / kPerFloat);
    const auto take = [&](size_t n) { return std::exchange(memory, memory + n); };
    const auto take_elements = [&](size_t n) { return reinterpret_cast<Element*>(take(n / kPerFloat)); };
    sums = take(rows * width);
    scores = take(rows * kTile);
    largest = take(of_rows);
    totals = take(of_rows);
    factors = take(kTile);
    scales = take(kTile);
    unpacked = take(2 * kPanel * depth);
    queries = take_elements(of_rows * depth);
    weights = take_elements(of_rows * kTile);
    keys = take_elements(kTile * depth);
    values = take_elements(kTile * width);
  }

  size_t num_queries() const { return static_cast<size_t>(block.num_tokens) * group; }
  int64_t num_context_rows() const { return std::max<int64_t>(block.context_len + block.num_tokens - 1, 0); }
  ContextRows context(const void* pool) const {
    return {args, block.blocks, head, pool, static_cast<size_t>(num_context_rows())};
  }

  // How many rows of a tile a query sees.
  size_t num_visible(size_t query, const TileRows& tile) const {
    const int64_t seen = block.context_len + static_cast<int64_t>(query / group) - static_cast<int64_t>(tile.begin);
    return static_cast<size_t>(std::clamp<int64_t>(seen, 0, static_cast<int64_t>(tile.count)));
  }
  // The first query that sees row i of a tile, or one before it where a product can begin.
  size_t first_query(const TileRows& tile, size_t i) const {
    const int64_t token = static_cast<int64_t>(tile.begin + i) + 1 - block.context_len;
    const size_t step = row_step<Element>(args);
    return static_cast<size_t>(std::max<int64_t>(token, 0)) * group / step * step;
  }
};

HWY_INLINE void multiply_with(const BFloat16Products*, const Product<float>& p) {
  multiply(p);
}
HWY_INLINE void multiply_with(const BFloat16Products* products, const Product<uint16_t>& p) {
  products->multiply(p);
}

template <class Element>
void load_queries(const Work<Element>& w) {
  const PagedAttentionArgs& args = w.args;
  std::memset(w.queries, 0, w.rows * w.depth * sizeof(Element));
  std::memset(w.weights, 0, w.rows * kTile * sizeof(Element));
  for (size_t i = 0; i < w.num_queries(); ++i) {
    const auto token = w.block.token + static_cast<int64_t>(i / w.group);
    const void* q = args.q.at(token, w.head * static_cast<int64_t>(w.group) + static_cast<int64_t>(i % w.group));
    if constexpr (kIsBFloat16<Element>) {
      std::memcpy(w.queries + i * w.depth, q, args.D * sizeof(uint16_t));
    } else {
      load_row(args.q.dtype, q, args.D, w.queries + i * w.depth);
    }
    w.largest[i] = kNoScore;
    w.totals[i] = 0;
  }
}

// Queries that see none of a panel of 16 rows are left out.
template <class Element>
void multiply_keys(const Work<Element>& w, const TileRows& tile) {
  const bool all_see_all = w.num_visible(0, tile) == tile.count;
  const size_t panels = (tile.count + kPanel - 1) / kPanel;
  const size_t at_once = all_see_all ? panels : 1;
  for (size_t panel = 0; panel < panels; panel += at_once) {
    const size_t query = w.first_query(tile, panel * kPanel);
    multiply_with(
        w.args.products,
        Product<Element>{
            .terms = {{.a = w.queries + query * w.depth, .b = w.keys + panel * w.depth * kPanel, .depth = w.depth}},
            .num_terms = 1,
            .rows = w.rows - query,
            .panels = at_once,
            .a_stride = w.depth,
            .b_stride = w.depth * kPanel,
            .c = w.scores + (panel * w.rows + query) * kPanel,
            .c_stride = w.rows * kPanel});
  }
}

// 2^x for x <= 0, to about one unit in the last place; zero below 2^-125.
HWY_INLINE VF exp2_decay(F32 d, VF x) {
  const I32 i;
  const VF smallest = hn::Set(d, -125.0f);
  const auto is_zero = hn::Lt(x, smallest);
  const VF clamped = hn::IfThenElse(is_zero, smallest, x);
  const VF n = hn::Round(clamped);
  const VF r = hn::Sub(clamped, n);
  VF p = hn::Set(d, 1.54035304e-4f);  // ln(2)^k / k!
  p = hn::MulAdd(p, r, hn::Set(d, 1.33335581e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 9.61812911e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.55041087e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.40226507e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.93147181e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto power = hn::ShiftLeft<23>(hn::ConvertTo(i, n));
  const VF exact = hn::BitCast(d, hn::Add(hn::BitCast(i, p), power));
  return hn::IfThenElse(hn::IsNaN(x), x, hn::IfThenZeroElse(is_zero, exact));  // what NaN is as an integer differs
}

// Returns what is stored, as a number.
HWY_INLINE VF store_weight(F32 d, VF x, float* to) {
  hn::Store(x, d, to);
  return x;
}
HWY_INLINE VF store_weight(F32 d, VF x, uint16_t* to) {
  const VF rounded = rounded_up(d, x);
  store_low_halves(hn::ShiftRight<16>(hn::BitCast(U32(), rounded)), to);
  return upper_half(d, rounded);
}

// What belongs to the columns of a tile.
template <class Element>
void load_column_factors(const Work<Element>& w, const TileRows& tile) {
  constexpr float kLog2E = 1.44269504f;
  std::fill_n(w.factors, kTile, w.args.scale * kLog2E);
  if (!w.args.cache_rows.are_int8) return;
  for (size_t i = 0; i < tile.count; ++i) {
    w.factors[i] *= w.context(w.args.k).scale(tile.begin + i);
    w.scales[i] = w.context(w.args.v).scale(tile.begin + i);
  }
}

// Columns from `i` on; `hidden` for those that a query does not see.
HWY_INLINE VF where_visible(F32 d, VF x, size_t i, size_t num_visible, float hidden) {
  if (i + hn::Lanes(d) <= num_visible) return x;
  const auto is_visible = hn::Lt(hn::Iota(d, static_cast<float>(i)), hn::Set(d, static_cast<float>(num_visible)));
  return hn::IfThenElse(is_visible, x, hn::Set(d, hidden));
}

// Scores of a query from column `i` of a tile on, base 2.
template <class Element>
HWY_INLINE VF load_scores(const Work<Element>& w, size_t query, size_t num_visible, size_t i) {
  const F32 d;
  const VF product = hn::Load(d, w.scores + (i / kPanel * w.rows + query) * kPanel + i % kPanel);
  return where_visible(d, hn::Mul(product, hn::Load(d, w.factors + i)), i, num_visible, kNoScore);
}

// Raises the maximum of a query that sees any of the tile; what was summed under the old one is scaled down.
template <class Element>
void raise_largest(const Work<Element>& w, size_t query, size_t num_visible, size_t columns) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const float before = w.largest[query];
  VF all = hn::Set(d, before);
  for (size_t i = 0; i < columns; i += lanes) all = hn::Max(all, load_scores(w, query, num_visible, i));
  const float largest = hn::GetLane(hn::MaxOfLanes(d, all));
  if (!(largest > before)) return;
  w.largest[query] = largest;
  if (before == kNoScore) return;
  const VF keep = exp2_decay(d, hn::Set(d, before - largest));
  w.totals[query] *= hn::GetLane(keep);
  for (size_t column = 0; column < w.width; column += kPanel) {
    float* sums = w.sums + column * w.rows + query * kPanel;
    for (size_t i = 0; i < kPanel; i += lanes) hn::Store(hn::Mul(hn::Load(d, sums + i), keep), d, sums + i);
  }
}

template <class Element>
void store_weights(const Work<Element>& w, size_t query, size_t num_visible, size_t columns) {
  const F32 d;
  const VF largest = hn::Set(d, w.largest[query]);
  VF total = hn::Zero(d);
  for (size_t i = 0; i < columns; i += hn::Lanes(d)) {
    const VF weight = exp2_decay(d, hn::Sub(load_scores(w, query, num_visible, i), largest));
    Element* const to = w.weights + query * kTile + i;
    if (w.args.cache_rows.are_int8) {
      total = hn::Add(total, weight);
      store_weight(d, where_visible(d, hn::Mul(weight, hn::Load(d, w.scales + i)), i, num_visible, 0), to);
    } else {
      total = hn::Add(total, store_weight(d, weight, to));
    }
  }
  w.totals[query] += hn::GetLane(hn::SumOfLanes(d, total));
}

// Scores to weights. Two passes: the processor works on many queries at a time where little depends on a maximum.
template <class Element>
void soften(const Work<Element>& w, const TileRows& tile, size_t first, size_t columns) {
  for (size_t query = first; query < w.num_queries(); ++query) {
    const size_t num_visible = w.num_visible(query, tile);
    if (num_visible > 0) raise_largest(w, query, num_visible, columns);
  }
  for (size_t query = first; query < w.num_queries(); ++query) {
    const size_t num_visible = w.num_visible(query, tile);
    if (num_visible > 0) {
      store_weights(w, query, num_visible, columns);
    } else {
      std::memset(w.weights + query * kTile, 0, columns * sizeof(Element));
    }
  }
}

// Values that are infinite or NaN and that not every query sees: the product takes zero in their place.
template <class Element>
bool hide_special_values(const Work<Element>& w, const TileRows& tile, size_t first) {
  bool has_any = false;
  for_each_special_value(w.context(w.args.v), tile, first, w.unpacked, [&](size_t row, size_t column, float) {
    *value_at(w.values, row, column) = 0;
    has_any = true;
  });
  return has_any;
}

template <class Element>
void add_special_values(const Work<Element>& w, const TileRows& tile, size_t first) {
  for_each_special_value(w.context(w.args.v), tile, first, w.unpacked, [&](size_t row, size_t column, float value) {
    for (size_t query = 0; query < w.num_queries(); ++query) {
      if (row >= w.num_visible(query, tile)) continue;
      const float weight =
          load_scalar(kIsBFloat16<Element> ? DType::kBFloat16 : DType::kFloat32, w.weights + query * kTile + row);
      w.sums[(column / kPanel * w.rows + query) * kPanel + column % kPanel] += weight * value;
    }
  });
}

template <class Element>
void add_tile(const Work<Element>& w, const TileRows& tile) {
  const size_t count = round_up(tile.count, kDepthStep<Element>);
  pack_keys(w.context(w.args.k), tile, w.depth, w.unpacked, w.keys);
  pack_values(w.context(w.args.v), tile, count, w.width, w.values);
  load_column_factors(w, tile);
  multiply_keys(w, tile);
  const bool is_first = tile.begin == 0;
  const size_t first = is_first ? 0 : w.first_query(tile, 0);
  soften(w, tile, first, round_up(count, kPanel));
  const size_t seen_by_all = w.num_visible(first, tile);
  const bool has_special = seen_by_all < tile.count && hide_special_values(w, tile, seen_by_all);
  multiply_with(w.args.products, Product<Element>{.terms = {{.a = w.weights + first * kTile,  //
                                                             .b = w.values,
                                                             .depth = count}},
                                                  .num_terms = 1,
                                                  .rows = w.rows - first,
                                                  .panels = w.width / kPanel,
                                                  .a_stride = kTile,
                                                  .b_stride = kTile * kPanel,
                                                  .c = w.sums + first * kPanel,
                                                  .c_stride = w.rows * kPanel,
                                                  .accumulate = !is_first});
  if (has_special) add_special_values(w, tile, seen_by_all);
}

template <class Element>
void store_results(const Work<Element>& w) {
  const F32 d;
  const OutRows& out = w.args.out;
  float* row = w.unpacked;
  for (size_t query = 0; query < w.num_queries(); ++query) {
    const auto token = static_cast<int64_t>(query / w.group);
    const bool has_context = w.block.context_len + token > 0;
    const VF factor = hn::Set(d, has_context ? 1.0f / w.totals[query] : 0.0f);
    for (size_t column = 0; column < w.width; column += hn::Lanes(d)) {
      const float* sums = w.sums + (column / kPanel * w.rows + query) * kPanel + column % kPanel;
      const VF result = has_context ? hn::MulAdd(hn::Load(d, sums), factor, hn::Zero(d)) : hn::Zero(d);
      hn::Store(result, d, row + column);
    }
    const auto of_group = static_cast<int64_t>(query % w.group);
    store_row(out.dtype, row, w.args.D,
              out.at(w.block.token + token, w.head * static_cast<int64_t>(w.group) + of_group));
  }
}

template <class Element>
void attend(const PagedAttentionArgs& args, const AttentionBlock& block, int64_t head) {
  const Work<Element> w(args, block, head);
  load_queries(w);
  const int64_t context = w.num_context_rows();
  for (int64_t begin = 0; begin < context; begin += kTile) {
    add_tile(w, {static_cast<size_t>(begin), static_cast<size_t>(std::min<int64_t>(kTile, context - begin))});
  }
  store_results(w);
}

void paged_attention(const PagedAttentionArgs& args, const AttentionBlock& block, int64_t head) {
  if (args.products == nullptr) return attend<float>(args, block, head);
  args.products->begin();
  attend<uint16_t>(args, block, head);
  args.products->end();
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(paged_attention);

void paged_attention(const PagedAttentionArgs& args, const AttentionBlock& block, int64_t head) {
  HWY_DYNAMIC_DISPATCH(paged_attention)(args, block, head);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
