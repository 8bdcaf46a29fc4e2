// SPDX-License-Identifier: Apache-2.0
// What products of rows have in common inside one instruction set: blocks of outputs for a few tokens at once, the
// bias, and the rounding to out.
#if defined(XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_
#undef XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_
#endif

#include <algorithm>

#include "core/kernels/cpu/simd-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kBlockOutputs = 32;  // of a work item
inline constexpr size_t kTokensAtOnce = 6;   // what 16 registers leave room for

// A block's outputs for some tokens.
struct OutputBlock {
  int64_t output;  // the first
  size_t rows;     // outputs of the block
  int64_t token;   // the first
  float* sums;     // [tokens, kBlockOutputs], to be written
};

// Calls f.operator()<count>() for 1 <= count <= kMost.
template <size_t kMost, class F>
void with_count(int64_t count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < static_cast<int64_t>(kMost)) return with_count<kMost - 1>(count, f);
  }
  f.template operator()<kMost>();
}

// Calls f(begin, count) for parts of even sizes.
template <class F>
void for_even_parts(int64_t total, int64_t most, const F& f) {
  const int64_t parts = (total + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * total / parts;
    f(begin, (part + 1) * total / parts - begin);
  }
}

// Calls multiply(block, num_tokens) for `rows` outputs, up to kTokens at once. Args have T, O, bias and out of a
// product.
template <size_t kTokens, class Args, class Multiply>
void multiply_block_outputs(const Args& args, int64_t output, size_t rows, const Multiply& multiply) {
  const F32 d;
  HWY_ALIGN float sums[kTokens * kBlockOutputs];
  HWY_ALIGN float bias[kBlockOutputs] = {};
  if (args.bias.data != nullptr) load_row(args.bias.dtype, args.bias.at(0, output), rows, bias);
  for_even_parts(args.T, kTokens, [&](int64_t token, int64_t count) HWY_ATTR {
    multiply(OutputBlock{output, rows, token, sums}, count);
    for (int64_t t = 0; t < count; ++t) {
      float* of_token = sums + static_cast<size_t>(t) * kBlockOutputs;
      if (args.bias.data != nullptr) {
        for (size_t j = 0; j < rows; j += hn::Lanes(d)) {
          hn::Store(hn::Add(hn::Load(d, of_token + j), hn::Load(d, bias + j)), d, of_token + j);
        }
      }
      store_row(args.out.dtype, of_token, rows, args.out.at(token + t, output));
    }
  });
}

// The same for items of kBlockOutputs.
template <size_t kTokens, class Args, class Multiply>
void multiply_blocks(const Args& args, int64_t begin_item, int64_t end_item, const Multiply& multiply) {
  constexpr auto kOutputs = static_cast<int64_t>(kBlockOutputs);
  for (int64_t item = begin_item; item < end_item; ++item) {
    const int64_t output = item * kOutputs;
    multiply_block_outputs<kTokens>(args, output, static_cast<size_t>(std::min(kOutputs, args.O - output)), multiply);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_
