// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias in bf16: the weights as they lie are A of packed_product.h, the tokens are B.
//
//            D ->                     Loop: block of 32 outputs -> pair of panels -> D. Weights come from memory once,
//        +---------+   16 tokens      in its order. Up to two panels: blocks of 16 outputs, and the one that the thread
//   O    | weight  | x  | x |         takes next is fetched meanwhile, line for line of what is multiplied: 16 threads
//        +---------+    | | |         then read as fast as loops that do nothing else, 8 to 20% faster.
//                                     Many tokens: block of 128 -> pair of panels -> pieces of D -> 32 outputs. A piece
//                                     of the pair stays in the first-level cache, the block in the second, and tokens
//                                     come a quarter as often. The first pair takes D at once, as above. Weights copied
//                                     to rows that share no sets of a cache gained nothing.
//                                     Rounding: sums are f32, a token's in ascending D whatever tokens are beside it;
//                                     the bias is added in f32; out is rounded once. Lanes of a panel without a token
//                                     are whatever was in memory: no token's sum sees another lane.
#include "core/kernels/cpu/linear.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/linear.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/packed_product-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kTransposed = 4;  // rows that `transpose` takes at once
inline constexpr int64_t kTokens = kPanel;
inline constexpr int64_t kPanelsAtOnce = 2;
inline constexpr int64_t kMostItems = 4;  // of a block
inline constexpr int64_t kPiece = 256;    // of D: 16 KiB of a pair of panels
inline constexpr size_t kMostRows = kMostItems * kLinearBlock;
inline constexpr size_t kSums = kMostRows * kPanel;  // of a panel

void pack_tokens(const LinearArgs& args, int64_t begin_panel, int64_t end_panel) {
  const size_t pairs = static_cast<size_t>(args.D) / 2;
  const size_t stride = static_cast<size_t>(args.x.token_stride) / 2;
  for (int64_t panel = begin_panel; panel < end_panel; ++panel) {
    const int64_t token = panel * static_cast<int64_t>(kPanel);
    const size_t count = std::min<size_t>(kPanel, static_cast<size_t>(args.T - token));
    const auto* from = static_cast<const uint32_t*>(args.x.at(token, 0));
    auto* to = reinterpret_cast<uint32_t*>(args.packed) + static_cast<size_t>(panel) * pairs * kPanel;
    const size_t whole = count / kTransposed * kTransposed;
    transpose(from, whole, pairs, stride, to, kPanel);
    for (size_t lane = whole; lane < count; ++lane) {
      for (size_t i = 0; i < pairs; ++i) to[i * kPanel + lane] = from[lane * stride + i];
    }
  }
}

// Adds the bias to sums of one panel [rows, 16].
void add_bias(const float* bias, size_t rows, float* sums) {
  const F32 d;
  for (size_t r = 0; r < rows; ++r) {
    for (size_t i = 0; i < kPanel; i += hn::Lanes(d)) {
      float* at = sums + r * kPanel + i;
      hn::StoreU(hn::Add(hn::LoadU(d, at), hn::Set(d, bias[r])), d, at);
    }
  }
}

// Rounds sums of one panel in place, two outputs of a token to a word: [rows, 16] to [rows / 2, 16].
void round_pairs(size_t rows, float* sums) {
  const F32 d;
  const U32 u;
  auto* words = reinterpret_cast<uint32_t*>(sums);
  for (size_t r = 0; r < rows; r += 2) {
    for (size_t i = 0; i < kPanel; i += hn::Lanes(d)) {
      const auto even = round_to_upper_half(hn::LoadU(d, sums + r * kPanel + i));
      const auto odd = round_to_upper_half(hn::LoadU(d, sums + (r + 1) * kPanel + i));
      const auto both = hn::Or(hn::ShiftRight<16>(even), hn::And(odd, hn::Set(u, 0xFFFF0000u)));
      hn::StoreU(both, u, words + r / 2 * kPanel + i);
    }
  }
}

// Sums of one panel, which are spent, to the rows of out.
void write_panel(const LinearArgs& args, float* sums, int64_t output, size_t rows, int64_t panel) {
  const int64_t token = panel * static_cast<int64_t>(kPanel);
  const size_t count = std::min<size_t>(kPanel, static_cast<size_t>(args.T - token));
  const size_t whole = count / kTransposed * kTransposed;
  const size_t bytes = rows * static_cast<size_t>(size_of(args.out.dtype));  // of a token
  const size_t words = bytes / sizeof(uint32_t);
  if (args.out.dtype == DType::kBFloat16) round_pairs(rows, sums);
  transpose(sums, words, whole, kPanel, args.out.at(token, output),
            static_cast<size_t>(args.out.token_stride * size_of(args.out.dtype)) / sizeof(uint32_t));
  if (whole == count) return;
  uint32_t rest[kTransposed * kMostRows];
  transpose(sums + whole, words, kTransposed, kPanel, rest, kMostRows);
  for (size_t t = whole; t < count; ++t) {
    std::memcpy(args.out.at(token + static_cast<int64_t>(t), output), rest + (t - whole) * kMostRows, bytes);
  }
}

// Outputs from `output` on, of all tokens; D is taken at once by the first pair of panels, and by others in pieces. The
// first pair brings `ahead` to the second-level cache.
void multiply_rows(const LinearArgs& args, int64_t output, size_t rows, int64_t piece_of_others, const uint16_t* ahead,
                   size_t ahead_bytes) {
  const int64_t panels = num_panels(args);
  const auto panel_size = static_cast<size_t>(args.D) * kPanel;
  const size_t out_bytes = rows * static_cast<size_t>(size_of(args.out.dtype));  // of a token
  const uint16_t* weight = args.weight + output * args.weight_stride;
  float* sums = scratch<LinearArgs>(kPanelsAtOnce * kSums);
  float bias[kMostRows];
  if (args.bias.data != nullptr) load_row(args.bias.dtype, args.bias.at(0, output), rows, bias);
  for (int64_t panel = 0; panel < panels; panel += kPanelsAtOnce) {
    const int64_t end_panel = std::min(panel + kPanelsAtOnce, panels);
    const int64_t end_token = std::min(end_panel * kTokens, args.T);
    for (int64_t t = panel * kTokens; t < end_token; ++t) prefetch<1>(args.out.at(t, output), out_bytes);
    const int64_t piece = panel > 0 ? piece_of_others : args.D;
    for (int64_t d = 0; d < args.D; d += piece) {
      const uint16_t* tokens = args.packed + static_cast<size_t>(panel) * panel_size + static_cast<size_t>(d) * kPanel;
      args.products->multiply({.terms = {{weight + d, tokens, static_cast<size_t>(std::min(piece, args.D - d))}},
                               .num_terms = 1,
                               .rows = rows,
                               .panels = static_cast<size_t>(end_panel - panel),
                               .a_stride = static_cast<size_t>(args.weight_stride),
                               .b_stride = panel_size,
                               .c = sums,
                               .c_stride = kSums,
                               .accumulate = d > 0,
                               .ahead = ahead,
                               .ahead_bytes = panel > 0 ? 0 : ahead_bytes});
    }
    for (int64_t i = panel; i < end_panel; ++i) {
      float* of_panel = sums + static_cast<size_t>(i - panel) * kSums;
      if (args.bias.data != nullptr) add_bias(bias, rows, of_panel);
      write_panel(args, of_panel, output, rows, i);
    }
  }
}

void linear(const LinearArgs& args, int64_t begin_item, int64_t end_item) {
  const int64_t items = num_neighbours(args);
  args.products->begin();
  for (int64_t item = begin_item; item < end_item; item += items) {
    const int64_t output = item * kLinearBlock;
    const int64_t end = std::min(args.O, std::min(item + items, end_item) * kLinearBlock);
    multiply_rows(args, output, static_cast<size_t>(end - output), items > 1 ? kPiece : args.D, nullptr, 0);
  }
  args.products->end();
}

void linear_of_few(const LinearArgs& args, int64_t item, int64_t next_item) {
  const int64_t block = kFewBlock * args.weight_stride;
  const bool is_next = next_item < num_few_items(args) && args.weight_stride == args.D;
  args.products->begin();
  multiply_rows(args, item * kFewBlock, kFewBlock, args.D, is_next ? args.weight + next_item * block : nullptr,
                is_next ? static_cast<size_t>(block) * sizeof(uint16_t) : 0);
  args.products->end();
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(pack_tokens);
HWY_EXPORT(linear);
HWY_EXPORT(linear_of_few);

void pack_tokens(const LinearArgs& args, int64_t begin_panel, int64_t end_panel) {
  HWY_DYNAMIC_DISPATCH(pack_tokens)(args, begin_panel, end_panel);
}

void linear(const LinearArgs& args, int64_t begin_item, int64_t end_item) {
  HWY_DYNAMIC_DISPATCH(linear)(args, begin_item, end_item);
}

void linear_of_few(const LinearArgs& args, int64_t item, int64_t next_item) {
  HWY_DYNAMIC_DISPATCH(linear_of_few)(args, item, next_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
