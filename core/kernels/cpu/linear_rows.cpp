// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias: a dot product of two rows for each output and token.
//
//            D ->
//        +---------+   Loop: block of 16 or 32 outputs -> up to 6 tokens -> piece of D -> 4 outputs, or 2 of more than
//   O    | weight  |   3 tokens -> lanes. Their sums stay in registers: weights are widened once for all tokens, a
//        +---------+   token's vector is loaded once for all outputs. The piece of the tokens stays in a cache near by,
//        +---------+   the block of weights in the second-level one. Weights come from memory once, while the block
//   T    | tokens  |   before is multiplied: each group of tokens fetches a share of them, so that memory never rests;
//        +---------+   for one or two tokens row by row, without a word about it (is_in_order).
//                      Rounding: weights and tokens are widened exactly; sums are f32: of every lane in ascending D,
//                      the even element of a pair before the odd one, then over the lanes, whatever tokens are beside
//                      it; the bias is added in f32; out is rounded once.
//
// Many tokens: as many outputs as the second-level cache holds the weights of -> 24 tokens -> block. Tokens come as
// often as that from memory, before they are multiplied, and so do the rows of out, which lie in as many pages.
//
// With AVX512-BF16 pairs are multiplied as they lie, tokens too, in the processor's own order within a pair. The sums
// of 4 outputs for 6 tokens fit into 32 registers, or of 3 for 8, by which a step of 8 reads its weights once. bf16
// below 2^-126 counts as zero there.
#include "core/kernels/cpu/linear_rows.h"

#include <algorithm>
#include <span>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/linear_rows.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/lane_sums-inl.h"
#include "core/kernels/cpu/output_blocks-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kSumsAtOnce = 12;      // what 16 registers leave room for
inline constexpr size_t kTokensOfLanes = 4;    // at most, for which memory is slower: lanes are summed after the block
inline constexpr int64_t kTokensInOrder = 2;   // at most, for which weights are read in the order of memory
inline constexpr size_t kTokensOfTile = 6;     // of several tiles: those of four outputs leave no rest of a block
inline constexpr int64_t kTokensOfGroup = 24;  // of many, that are multiplied by all outputs of a call

inline constexpr size_t kLine = 64;  // of a cache

// The next block of weights, brought to the second-level cache while one is multiplied: with each group of tokens a
// share of it, as many lines at once as keep pace.
class Ahead {
 public:
  /// Fetches the share of `next` that falls to `num_tokens` of T tokens from `token` on.
  Ahead(std::span<const uint16_t> next, int64_t token, int64_t num_tokens, int64_t T) {
    const size_t lines = (next.size_bytes() + kLine - 1) / kLine;
    const auto line = [&](int64_t t) { return reinterpret_cast<const char*>(next.data()) + lines * t / T * kLine; };
    next_ = line(token);
    end_ = line(token + num_tokens);
    lines_ = static_cast<size_t>((4 * num_tokens + T - 1) / T);  // with lines of 4 outputs, the most at once
  }

  void fetch_before_group() {}

  /// While kOutputs lines are multiplied.
  template <size_t kOutputs>
  HWY_INLINE void fetch() {
    if (next_ >= end_) return;
    __builtin_prefetch(next_, 0, 2);
    if (kOutputs > 1 && lines_ > 1) __builtin_prefetch(next_ + kLine, 0, 2);
    if (kOutputs > 2 && lines_ > 2) __builtin_prefetch(next_ + 2 * kLine, 0, 2);
    if (kOutputs > 3 && lines_ > 3) __builtin_prefetch(next_ + 3 * kLine, 0, 2);
    next_ += std::min(kOutputs, lines_) * kLine;
  }

 private:
  const char* next_;
  const char* end_;
  size_t lines_;
};

// In the place of it, lines of anything: a share of them between one group of outputs and the next. All at once they
// would hold up what is multiplied: a Zen 4 took 6% longer for 2,048 tokens of 3,584.
class LinesAhead {
 public:
  LinesAhead(const char* begin, const char* end)
      : next_(begin), end_(end), at_once_((end - begin + kShares - 1) / kShares) {}

  void fetch_before_group() {
    for (const char* const end = next_ + std::min(at_once_, end_ - next_); next_ < end; next_ += kLine) {
      __builtin_prefetch(next_, 0, 2);
    }
  }
  template <size_t kOutputs>
  HWY_INLINE void fetch() {}

 private:
  static constexpr int64_t kShares = kBlockOutputs / 4;

  const char* next_;
  const char* end_;
  int64_t at_once_;  // bytes
};

// Where the sums of a piece of D go.
struct PieceSums {
  float* lanes;    // [outputs, tokens] vectors, of the pieces so far
  bool is_first;   // of the pieces: nothing has been summed
  float* outputs;  // [tokens, kBlockOutputs], sums over the lanes; null: lanes are kept
};

void widen_row(const uint16_t* from, int64_t D, float* to) {
  const F32 d;
  const int64_t lanes = hn::Lanes(d);
  for (int64_t i = 0; i < D; i += 2 * lanes) {
    VF first, second;
    load_pair(d, from + i, first, second);
    hn::StoreU(first, d, to + i);
    hn::StoreU(second, d, to + i + lanes);
  }
}

void widen_tokens(const LinearRowsArgs& args, int64_t begin_token, int64_t end_token) {
  for (int64_t token = begin_token; token < end_token; ++token) {
    widen_row(static_cast<const uint16_t*>(args.x.at(token, 0)), args.D, args.widened + token * widened_stride(args.D));
  }
}

template <size_t kIndex, class... Rest>
HWY_INLINE VF pick(VF first, Rest... rest) {
  if constexpr (kIndex == 0) {
    return first;
  } else {
    return pick<kIndex - 1>(rest...);
  }
}

// Sum kIndex of [kOutputs, kTokens].
template <size_t kOutputs, size_t kTokens, size_t kIndex>
HWY_INLINE VF add_product(VF sum, VF w0, VF w1, VF w2, VF w3, VF x0, VF x1, VF x2, VF x3, VF x4, VF x5) {
  if constexpr (kIndex < kOutputs * kTokens) {
    return hn::MulAdd(pick<kIndex / kTokens>(w0, w1, w2, w3), pick<kIndex % kTokens>(x0, x1, x2, x3, x4, x5), sum);
  } else {
    return sum;
  }
}

// Adds a piece of D to sums.
template <size_t kOutputs, size_t kTokens, class AheadOf>
HWY_INLINE void add_piece(const uint16_t* HWY_RESTRICT weight, size_t weight_stride, const float* HWY_RESTRICT tokens,
                          size_t token_stride, size_t depth, AheadOf& ahead, const PieceSums& sums) {
  static_assert(kOutputs <= 4 && kTokens <= kTokensAtOnce && kOutputs * kTokens <= kSumsAtOnce);
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  const auto sum = [&](size_t i) HWY_ATTR {
    return sums.is_first || i >= kOutputs * kTokens ? hn::Zero(d) : hn::Load(d, sums.lanes + i * lanes);
  };
  VF s0 = sum(0), s1 = sum(1), s2 = sum(2), s3 = sum(3), s4 = sum(4), s5 = sum(5);
  VF s6 = sum(6), s7 = sum(7), s8 = sum(8), s9 = sum(9), s10 = sum(10), s11 = sum(11);
  const auto add = [&](VF w0, VF w1, VF w2, VF w3, const float* HWY_RESTRICT at) HWY_ATTR {
    const auto token = [&](size_t t) HWY_ATTR { return hn::LoadU(d, at + (t < kTokens ? t : 0) * token_stride); };
    const VF x0 = token(0), x1 = token(1), x2 = token(2), x3 = token(3), x4 = token(4), x5 = token(5);
    s0 = add_product<kOutputs, kTokens, 0>(s0, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s1 = add_product<kOutputs, kTokens, 1>(s1, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s2 = add_product<kOutputs, kTokens, 2>(s2, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s3 = add_product<kOutputs, kTokens, 3>(s3, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s4 = add_product<kOutputs, kTokens, 4>(s4, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s5 = add_product<kOutputs, kTokens, 5>(s5, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s6 = add_product<kOutputs, kTokens, 6>(s6, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s7 = add_product<kOutputs, kTokens, 7>(s7, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s8 = add_product<kOutputs, kTokens, 8>(s8, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s9 = add_product<kOutputs, kTokens, 9>(s9, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s10 = add_product<kOutputs, kTokens, 10>(s10, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
    s11 = add_product<kOutputs, kTokens, 11>(s11, w0, w1, w2, w3, x0, x1, x2, x3, x4, x5);
  };
  for (size_t i = 0; i < depth; i += 2 * lanes) {
    VF even0, odd0, even1, odd1, even2, odd2, even3, odd3;
    const auto load_row_of = [&](size_t output, VF& even, VF& odd) HWY_ATTR {
      load_pair(d, weight + (output < kOutputs ? output : 0) * weight_stride + i, even, odd);
    };
    ahead.template fetch<kOutputs>();
    load_row_of(0, even0, odd0);
    load_row_of(1, even1, odd1);
    load_row_of(2, even2, odd2);
    load_row_of(3, even3, odd3);
    add(even0, even1, even2, even3, tokens + i);
    add(odd0, odd1, odd2, odd3, tokens + i + lanes);
  }
  const auto keep = [&](size_t i, VF s) HWY_ATTR {
    if (i >= kOutputs * kTokens) return;
    if (sums.outputs != nullptr) {
      sums.outputs[i % kTokens * kBlockOutputs + i / kTokens] = hn::GetLane(hn::SumOfLanes(d, s));
    } else {
      hn::Store(s, d, sums.lanes + i * lanes);
    }
  };
  keep(0, s0), keep(1, s1), keep(2, s2), keep(3, s3), keep(4, s4), keep(5, s5);
  keep(6, s6), keep(7, s7), keep(8, s8), keep(9, s9), keep(10, s10), keep(11, s11);
}

// Products of widened rows.
struct WidenedRows {
  static constexpr size_t kTokensAtOnce = HWY_NAMESPACE::kTokensAtOnce;
  static constexpr size_t kTokenElements = 6144;  // that stay in the first-level cache: 24 KiB
  static constexpr size_t piece_elements(size_t, size_t) { return kTokenElements; }
  static constexpr size_t outputs_at_once(size_t tokens) { return tokens > 3 ? 2 : 4; }

  static int64_t token_stride(const LinearRowsArgs& args) { return widened_stride(args.D); }
  static const float* tokens(const LinearRowsArgs& args, int64_t token) {
    return args.widened + token * token_stride(args);
  }

  static void sum_lanes_of_sixteen(const float* lanes, size_t stride, float* sums) {
    const F32 d;
    for (int64_t row = 0; row < kLinearRowsStep; ++row)
      sums[row] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, lanes + static_cast<size_t>(row) * stride)));
  }

  template <size_t kOutputs, size_t kTokens, class AheadOf>
  static HWY_INLINE void add_piece(const uint16_t* weight, size_t weight_stride, const float* tokens,
                                   size_t token_stride, size_t depth, AheadOf& ahead, const PieceSums& sums) {
    HWY_NAMESPACE::add_piece<kOutputs, kTokens>(weight, weight_stride, tokens, token_stride, depth, ahead, sums);
  }
};

#ifdef XGDN_HARDWARE_BFLOAT16

HWY_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// Products of pairs as they lie.
struct PairedRows {
  static constexpr size_t kTokensAtOnce = 8;
  static constexpr size_t kTokenElements = 8192;  // that stay in the first-level cache: 16 KiB
  // Of the tokens at once. For groups of four outputs the second-level cache keeps pace; for those of three, tokens
  // that the first-level cache does not hold are cut.
  static constexpr size_t piece_elements(size_t tokens, size_t depth) {
    if (outputs_at_once(tokens) > 3) return 3 * kTokenElements;
    return tokens * depth > 2 * kTokenElements ? kTokenElements : 2 * kTokenElements;
  }
  static constexpr size_t outputs_at_once(size_t tokens) { return tokens > 6 ? 3 : 4; }

  static int64_t token_stride(const LinearRowsArgs& args) { return args.x.token_stride; }
  static const uint16_t* tokens(const LinearRowsArgs& args, int64_t token) {
    return static_cast<const uint16_t*>(args.x.at(token, 0));
  }

  static void sum_lanes_of_sixteen(const float* lanes, size_t stride, float* sums) {
    HWY_NAMESPACE::sum_lanes_of_sixteen(lanes, stride, sums);
  }

  template <size_t kOutputs, size_t kTokens, class AheadOf>
  static HWY_INLINE void add_piece(const uint16_t* HWY_RESTRICT weight, size_t weight_stride,
                                   const uint16_t* HWY_RESTRICT tokens, size_t token_stride, size_t depth,
                                   AheadOf& ahead, const PieceSums& sums) {
    constexpr size_t kLanes = 16;
    __m512 s[kOutputs][kTokens];
#pragma GCC unroll 4
    for (size_t output = 0; output < kOutputs; ++output) {
#pragma GCC unroll 8
      for (size_t t = 0; t < kTokens; ++t) {
        s[output][t] =
            sums.is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums.lanes + (output * kTokens + t) * kLanes);
      }
    }
    for (size_t i = 0; i < depth; i += 2 * kLanes) {
      ahead.template fetch<kOutputs>();
      __m512i w[kOutputs];
#pragma GCC unroll 4
      for (size_t output = 0; output < kOutputs; ++output) {
        w[output] = _mm512_loadu_si512(weight + output * weight_stride + i);
      }
#pragma GCC unroll 8
      for (size_t t = 0; t < kTokens; ++t) {
        const __m512i x = _mm512_loadu_si512(tokens + t * token_stride + i);
#pragma GCC unroll 4
        for (size_t output = 0; output < kOutputs; ++output) {
          s[output][t] = add_pairs(s[output][t], w[output], x);
        }
      }
    }
    if (sums.outputs != nullptr) return sum_lanes(s, sums.outputs);
#pragma GCC unroll 4
    for (size_t output = 0; output < kOutputs; ++output) {
#pragma GCC unroll 8
      for (size_t t = 0; t < kTokens; ++t) _mm512_store_ps(sums.lanes + (output * kTokens + t) * kLanes, s[output][t]);
    }
  }

 private:
  // outputs [kTokens, kBlockOutputs]: four outputs of four tokens at once, the last ones for those that there are not.
  template <size_t kOutputs, size_t kTokens>
  static HWY_INLINE void sum_lanes(const __m512 (&s)[kOutputs][kTokens], float* outputs) {
    constexpr __mmask8 kMask = (1u << kOutputs) - 1;
    const auto output = [](size_t i) { return std::min(i, kOutputs - 1); };
#pragma GCC unroll 2
    for (size_t begin = 0; begin < kTokens; begin += 4) {
      __m512 fours[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        const size_t t = std::min(begin + i, kTokens - 1);
        fours[i] = sum_fours(s[0][t], s[output(1)][t], s[output(2)][t], s[output(3)][t]);
      }
      const __m512 of_tokens = sum_of_fours(fours);
      float* at = outputs + begin * kBlockOutputs;
      _mm_mask_storeu_ps(at, kMask, _mm512_castps512_ps128(of_tokens));
      if (begin + 1 < kTokens) _mm_mask_storeu_ps(at + kBlockOutputs, kMask, _mm512_extractf32x4_ps(of_tokens, 1));
      if (begin + 2 < kTokens) _mm_mask_storeu_ps(at + 2 * kBlockOutputs, kMask, _mm512_extractf32x4_ps(of_tokens, 2));
      if (begin + 3 < kTokens) _mm_mask_storeu_ps(at + 3 * kBlockOutputs, kMask, _mm512_extractf32x4_ps(of_tokens, 3));
    }
  }
};

#endif

// A block's dot products; `lanes` is memory for those of the lanes.
template <class Rows, size_t kTokens, size_t kOutputs, class AheadOf>
void multiply_block(const LinearRowsArgs& args, const OutputBlock& block, AheadOf ahead, float* lanes) {
  constexpr bool kIsLater = kTokens <= kTokensOfLanes;
  const size_t vector = hn::Lanes(F32());
  const auto stride = static_cast<size_t>(args.weight_stride);
  const auto depth = static_cast<size_t>(args.D);
  const uint16_t* weight = args.weight + block.output * args.weight_stride;
  const auto* tokens = Rows::tokens(args, block.token);
  const auto token_stride = static_cast<size_t>(Rows::token_stride(args));
  const size_t piece = Rows::piece_elements(kTokens, depth) / kTokens / (2 * kMaxLanes) * (2 * kMaxLanes);
  for (size_t begin = 0; begin < depth; begin += piece) {
    const auto add_rows = [&]<size_t kCount>(size_t row) {
      ahead.fetch_before_group();
      Rows::template add_piece<kCount, kTokens>(
          weight + row * stride + begin, stride, tokens + begin, token_stride, std::min(piece, depth - begin), ahead,
          {.lanes = lanes + row * kTokens * vector,
           .is_first = begin == 0,
           .outputs = begin + piece < depth || kIsLater ? nullptr : block.sums + row});
    };
    size_t row = 0;
    for (; row + kOutputs <= block.rows; row += kOutputs) add_rows.template operator()<kOutputs>(row);
    for (; row < block.rows; ++row) add_rows.template operator()<1>(row);
  }
  if constexpr (kIsLater) {
    for (size_t row = 0; row < block.rows; row += kLinearRowsStep) {
      for (size_t t = 0; t < kTokens; ++t) {
        Rows::sum_lanes_of_sixteen(lanes + (row * kTokens + t) * vector, kTokens * vector,
                                   block.sums + t * kBlockOutputs + row);
      }
    }
  }
}

// The same for up to kMost tokens.
template <class Rows, size_t kMost, class AheadOf>
void multiply_tokens(const LinearRowsArgs& args, const OutputBlock& block, int64_t num_tokens, const AheadOf& ahead,
                     float* lanes) {
  with_count<kMost>(num_tokens, [&]<size_t kTokens>() {
    multiply_block<Rows, kTokens, Rows::outputs_at_once(kTokens)>(args, block, ahead, lanes);
  });
}

// One or two tokens that stay in the first-level cache: weights are read row by row as they lie in memory. Processors
// see that and read ahead by themselves, further than they can be told to: on a Zen 4 with large pages one token takes
// two thirds of the time.
template <class Rows>
bool is_in_order(const LinearRowsArgs& args) {
  constexpr size_t kFewLanes = 4;  // of which one chain of additions is slower than memory
  return hn::Lanes(F32()) > kFewLanes && args.T <= kTokensInOrder &&
         static_cast<size_t>(args.T * args.D) <= Rows::kTokenElements;
}

// The weights of the block that begins at `output`, none behind the last output.
std::span<const uint16_t> block_weights(const LinearRowsArgs& args, int64_t output) {
  if (output >= args.O) return {};
  const int64_t rows = std::min<int64_t>(args.O - output, kBlockOutputs);
  return {args.weight + output * args.D, static_cast<size_t>(rows * args.D)};
}

// Blocks of outputs from `output` on for up to kMost tokens at once, the weights of each block while the one before is
// multiplied.
template <class Rows, size_t kMost>
void multiply_rows(const LinearRowsArgs& args, int64_t output, int64_t end_output, int64_t following) {
  constexpr auto kOutputs = static_cast<int64_t>(kBlockOutputs);
  float* lanes = scratch<LinearRowsArgs>(kBlockOutputs * kMost * kMaxLanes);
  const bool in_order = is_in_order<Rows>(args), is_fetched = !in_order && args.weight_stride == args.D;
  for (int64_t next; output < end_output; output = next) {
    next = std::min(output + kOutputs, end_output);
    std::span<const uint16_t> fetched;
    if (is_fetched) fetched = block_weights(args, next < end_output ? next : following);
    multiply_block_outputs<kMost>(
        args, output, static_cast<size_t>(next - output), [&](const OutputBlock& block, int64_t num_tokens) {
          const Ahead ahead(fetched, block.token, num_tokens, args.T);
          if (in_order) {
            with_count<kTokensInOrder>(
                num_tokens, [&]<size_t kTokens>() { multiply_block<Rows, kTokens, 1>(args, block, ahead, lanes); });
          } else {
            multiply_tokens<Rows, kMost>(args, block, num_tokens, ahead, lanes);
          }
        });
  }
}

// Tokens that lie side by side, of which every block of outputs brings a share to the second-level cache.
template <class Rows>
class TokensAhead {
 public:
  TokensAhead(const LinearRowsArgs& args, int64_t token, int64_t end_token, int64_t shares)
      : next_(reinterpret_cast<const char*>(Rows::tokens(args, token))),
        end_(Rows::token_stride(args) > widened_stride(args.D)
                 ? next_
                 : reinterpret_cast<const char*>(Rows::tokens(args, end_token))),
        share_((end_ - next_ + shares - 1) / shares) {}

  LinesAhead take_share() {
    const char* const begin = next_;
    next_ += std::min(share_, end_ - next_);
    return {begin, next_};
  }

 private:
  const char* next_;
  const char* end_;
  int64_t share_;  // bytes
};

// Many tokens for outputs whose weights stay in the second-level cache.
template <class Rows>
void multiply_many(const LinearRowsArgs& args, int64_t first_output, int64_t end_output) {
  constexpr auto kOutputs = static_cast<int64_t>(kBlockOutputs);
  constexpr size_t kMost = kTokensOfTile;
  const auto element = static_cast<size_t>(size_of(args.out.dtype));
  const int64_t num_blocks = (end_output - first_output + kOutputs - 1) / kOutputs;
  float* lanes = scratch<LinearRowsArgs>(kBlockOutputs * kMost * kMaxLanes);
  for_even_parts(args.T, kTokensOfGroup, [&](int64_t token, int64_t num_tokens) {
    const LinearRowsArgs group = of_tokens(args, token, num_tokens);
    const int64_t tiles = (num_tokens + static_cast<int64_t>(kMost) - 1) / static_cast<int64_t>(kMost);
    TokensAhead<Rows> next(args, token + num_tokens, std::min(args.T, token + 2 * num_tokens), tiles * num_blocks);
    const auto fetch_out = [&](const OutputBlock& block, int64_t count) {
      for (int64_t t = block.token; t < block.token + count; ++t) {
        prefetch<1>(group.out.at(t, block.output), block.rows * element);
      }
    };
    for (int64_t output = first_output; output < end_output; output += kOutputs) {
      const auto rows = static_cast<size_t>(std::min(kOutputs, end_output - output));
      if (token > 0 || args.weight_stride != args.D) {
        multiply_block_outputs<kMost>(group, output, rows, [&](const OutputBlock& block, int64_t count) {
          fetch_out(block, count);
          multiply_tokens<Rows, kMost>(group, block, count, next.take_share(), lanes);
        });
      } else {
        const std::span<const uint16_t> weights = block_weights(args, output + kOutputs);
        multiply_block_outputs<kMost>(group, output, rows, [&](const OutputBlock& block, int64_t count) {
          fetch_out(block, count);
          multiply_tokens<Rows, kMost>(group, block, count, Ahead(weights, block.token, count, num_tokens), lanes);
        });
      }
    }
  });
}

template <class Rows>
void multiply(const LinearRowsArgs& args, int64_t output, int64_t end_output, int64_t following) {
  if (args.T >= kManyRowTokens) {
    multiply_many<Rows>(args, output, end_output);
  } else if (args.T > static_cast<int64_t>(Rows::kTokensAtOnce)) {
    multiply_rows<Rows, kTokensOfTile>(args, output, end_output, following);
  } else {
    multiply_rows<Rows, Rows::kTokensAtOnce>(args, output, end_output, following);
  }
}

static_assert(kLinearRowsStep * kLinearRowsPair == static_cast<int64_t>(kBlockOutputs));

void linear_rows(const LinearRowsArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item) {
  const int64_t output = begin_item * kLinearRowsStep, end_output = std::min(end_item * kLinearRowsStep, args.O);
  const int64_t following = next_item * kLinearRowsStep;
#ifdef XGDN_HARDWARE_BFLOAT16
  if (args.widened == nullptr) return multiply<PairedRows>(args, output, end_output, following);
#endif
  multiply<WidenedRows>(args, output, end_output, following);
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(widen_tokens);
HWY_EXPORT(linear_rows);

void widen_tokens(const LinearRowsArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(widen_tokens)(args, begin_token, end_token);
}

void linear_rows(const LinearRowsArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item) {
  HWY_DYNAMIC_DISPATCH(linear_rows)(args, begin_item, end_item, next_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
