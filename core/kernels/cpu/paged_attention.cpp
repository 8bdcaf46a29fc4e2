// SPDX-License-Identifier: Apache-2.0
// Softmax attention of one token with the query heads that share a key head.
//
// Loop: tile of 16 rows of the context -> scores -> softmax of the tile under the running maximum -> values. Each row
// of the cache is read once for all query heads. Rounding: q, k and v are widened exactly, all is f32, out is rounded
// once. The sums run over the rows in order, whatever other tokens are attended beside.
#include "core/kernels/cpu/paged_attention.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/paged_attention.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr int64_t kTileRows = 16;
static_assert(kTileRows % kMaxLanes == 0);
inline constexpr float kNoScore = -1e30f;  // its weight is zero beside any score

// One query head's part of the work; its rows are padded(D) long.
struct Query {
  float* q;        // scaled
  float* sum;      // of weighted values
  float* weights;  // [kTileRows], of the tile
  float& largest;  // score so far
  float& total;    // of the weights

  static int64_t size(int64_t width) { return 2 * width + kTileRows + static_cast<int64_t>(kMaxLanes); }
  Query(float* memory, int64_t width)
      : q(memory),
        sum(memory + width),
        weights(memory + 2 * width),
        largest(weights[kTileRows]),
        total(weights[kTileRows + 1]) {}
};

void scale(int64_t width, float factor, float* HWY_RESTRICT row) {
  const F32 d;
  for (int64_t j = 0; j < width; j += hn::Lanes(d)) {
    hn::Store(hn::Mul(hn::Load(d, row + j), hn::Set(d, factor)), d, row + j);
  }
}

// Rows `begin`.. of the context in one pool, as f32.
void load_tile(const PagedAttentionArgs& args, const AttentionToken& token, int64_t head, const void* pool,
               int64_t begin, int64_t count, float* HWY_RESTRICT to) {
  const DType dtype = args.q.dtype;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = token.blocks[(begin + i) / args.B] * args.B + (begin + i) % args.B;
    const int64_t offset = (row * args.HKV + head) * args.D * size_of(dtype);
    load_row(dtype, static_cast<const char*>(pool) + offset, args.D, to + i * padded(args.D));
  }
}

void score(int64_t width, const float* HWY_RESTRICT keys, int64_t count, const Query& query) {
  const F32 d;
  std::fill_n(query.weights, kTileRows, kNoScore);
  for (int64_t i = 0; i < count; ++i) {
    VF even = hn::Zero(d);
    VF odd = hn::Zero(d);
    const float* key = keys + i * width;
    int64_t j = 0;
    for (const int64_t lanes = hn::Lanes(d); j + 2 * lanes <= width; j += 2 * lanes) {
      even = hn::MulAdd(hn::Load(d, key + j), hn::Load(d, query.q + j), even);
      odd = hn::MulAdd(hn::Load(d, key + j + lanes), hn::Load(d, query.q + j + lanes), odd);
    }
    if (j < width) even = hn::MulAdd(hn::Load(d, key + j), hn::Load(d, query.q + j), even);
    query.weights[i] = hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
  }
}

// Scores to weights under the new maximum; what was summed under the old one is scaled down.
void soften(int64_t width, const Query& query) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  const float largest = std::max(query.largest, *std::max_element(query.weights, query.weights + kTileRows));
  const VF keep = exp(d, hn::Set(d, query.largest - largest));
  VF total = hn::Zero(d);
  for (int64_t i = 0; i < kTileRows; i += lanes) {
    const VF weight = exp(d, hn::Sub(hn::Load(d, query.weights + i), hn::Set(d, largest)));
    hn::Store(weight, d, query.weights + i);
    total = hn::Add(total, weight);
  }
  scale(width, hn::GetLane(keep), query.sum);
  query.total = query.total * hn::GetLane(keep) + hn::GetLane(hn::SumOfLanes(d, total));
  query.largest = largest;
}

void add_values(int64_t width, const float* HWY_RESTRICT values, int64_t count, const Query& query) {
  const F32 d;
  for (int64_t j = 0; j < width; j += hn::Lanes(d)) {
    VF sum = hn::Load(d, query.sum + j);
    for (int64_t i = 0; i < count; ++i) {
      sum = hn::MulAdd(hn::Set(d, query.weights[i]), hn::Load(d, values + i * width + j), sum);
    }
    hn::Store(sum, d, query.sum + j);
  }
}

void paged_attention(const PagedAttentionArgs& args, const AttentionToken& token, int64_t head) {
  const auto width = static_cast<int64_t>(padded(args.D));
  const int64_t group = args.HQ / args.HKV;
  float* tile = zeroed_scratch<PagedAttentionArgs>(kTileRows * width + group * Query::size(width));
  const auto query = [&](int64_t g) { return Query(tile + kTileRows * width + g * Query::size(width), width); };
  for (int64_t g = 0; g < group; ++g) {
    const Query of_head = query(g);
    of_head.largest = kNoScore;
    load_row(args.q.dtype, args.q.at(token.token, head * group + g), args.D, of_head.q);
    scale(width, args.scale, of_head.q);
  }
  for (int64_t begin = 0; begin < token.context_len; begin += kTileRows) {
    const int64_t count = std::min(kTileRows, token.context_len - begin);
    load_tile(args, token, head, args.k, begin, count, tile);
    for (int64_t g = 0; g < group; ++g) {
      score(width, tile, count, query(g));
      soften(width, query(g));
    }
    load_tile(args, token, head, args.v, begin, count, tile);
    for (int64_t g = 0; g < group; ++g) add_values(width, tile, count, query(g));
  }
  for (int64_t g = 0; g < group; ++g) {
    const Query of_head = query(g);
    if (token.context_len > 0) scale(width, 1.0f / of_head.total, of_head.sum);
    store_row(args.out.dtype, of_head.sum, args.D, args.out.at(token.token, head * group + g));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(paged_attention);

void paged_attention(const PagedAttentionArgs& args, const AttentionToken& token, int64_t head) {
  HWY_DYNAMIC_DISPATCH(paged_attention)(args, token, head);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
