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
inline constexpr size_t kTokensAtOnce = 6;

// A block's outputs for some tokens.
struct OutputBlock {
  int64_t output;  // the first
  size_t rows;     // outputs of the block
  int64_t token;   // the first
  float* sums;     // [tokens, kBlockOutputs], to be written
};

// Calls multiply.operator()<kTokens>(block).
template <class Multiply>
void multiply_tokens(const Multiply& multiply, const OutputBlock& block, int64_t num_tokens) {
  switch (num_tokens) {
    case 1:
      return multiply.template operator()<1>(block);
    case 2:
      return multiply.template operator()<2>(block);
    case 3:
      return multiply.template operator()<3>(block);
    case 4:
      return multiply.template operator()<4>(block);
    case 5:
      return multiply.template operator()<5>(block);
    default:
      return multiply.template operator()<kTokensAtOnce>(block);
  }
}

// Args have T, O, bias and out of a product.
template <class Args, class Multiply>
void multiply_blocks(const Args& args, int64_t begin_item, int64_t end_item, const Multiply& multiply) {
  constexpr auto kOutputs = static_cast<int64_t>(kBlockOutputs);
  constexpr auto kTokens = static_cast<int64_t>(kTokensAtOnce);
  const F32 d;
  HWY_ALIGN float sums[kTokensAtOnce * kBlockOutputs];
  HWY_ALIGN float bias[kBlockOutputs] = {};
  const int64_t groups = (args.T + kTokens - 1) / kTokens;
  for (int64_t item = begin_item; item < end_item; ++item) {
    const int64_t output = item * kOutputs;
    const auto rows = static_cast<size_t>(std::min(kOutputs, args.O - output));
    if (args.bias.data != nullptr) load_row(args.bias.dtype, args.bias.at(0, output), rows, bias);
    for (int64_t group = 0; group < groups; ++group) {  // of even sizes
      const int64_t token = group * args.T / groups;
      const int64_t count = (group + 1) * args.T / groups - token;
      multiply_tokens(multiply, {output, rows, token, sums}, count);
      for (int64_t t = 0; t < count; ++t) {
        float* of_token = sums + static_cast<size_t>(t) * kBlockOutputs;
        if (args.bias.data != nullptr) {
          for (size_t j = 0; j < rows; j += hn::Lanes(d)) {
            hn::Store(hn::Add(hn::Load(d, of_token + j), hn::Load(d, bias + j)), d, of_token + j);
          }
        }
        store_row(args.out.dtype, of_token, rows, args.out.at(token + t, output));
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_OUTPUT_BLOCKS_INL_H_
