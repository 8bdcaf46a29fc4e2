// SPDX-License-Identifier: Apache-2.0
// out = x weight^T + bias of f32, for few tokens: a dot product of two rows for each output and token.
//
// Loop: block of 16 outputs -> pair of outputs -> up to 4 tokens -> D -> lanes. The weights of a pair come from memory
// once, for the first tokens, and from the first-level cache for the others; the next block is fetched meanwhile.
// Rounding: f32; sums of every lane in ascending D, then over the lanes, whatever tokens are beside.
#include "core/kernels/cpu/linear_f32.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/linear_f32.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr int64_t kTokensOfPair = 4;

// The next block's weights: as many lines for each vector as the first tokens of this block take.
class NextBlock {
 public:
  NextBlock(const LinearF32Args& args, int64_t item) {
    if (item >= num_work_items(args) || args.weight_stride != args.D) return;
    const int64_t begin = item * kLinearF32Block, end = std::min(begin + kLinearF32Block, args.O);
    at_ = reinterpret_cast<const char*>(args.weight + begin * args.D);
    end_ = reinterpret_cast<const char*>(args.weight + end * args.D);
  }

  HWY_INLINE void fetch(size_t bytes) {
    for (const char* const stop = std::min(at_ + bytes, end_); at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr size_t kLine = 64;

  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

void write(const LinearF32Args& args, int64_t token, int64_t output, VF sum) {
  const float bias = args.bias == nullptr ? 0.0F : args.bias[output];
  args.out[token * args.out_stride + output] = hn::GetLane(hn::SumOfLanes(F32(), sum)) + bias;
}

// Tokens from `token` on, for two outputs, which may be the same.
template <int64_t kTokens>
void multiply_pair(const LinearF32Args& args, int64_t first, int64_t second, int64_t token, NextBlock& next) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const float* HWY_RESTRICT weight_a = args.weight + first * args.weight_stride;
  const float* HWY_RESTRICT weight_b = args.weight + second * args.weight_stride;
  const auto x = [&](int64_t t) { return args.x + (token + std::min(t, kTokens - 1)) * args.x_stride; };
  const float *HWY_RESTRICT x0 = x(0), *HWY_RESTRICT x1 = x(1), *HWY_RESTRICT x2 = x(2), *HWY_RESTRICT x3 = x(3);
  VF a0 = hn::Zero(d), a1 = hn::Zero(d), a2 = hn::Zero(d), a3 = hn::Zero(d);
  VF b0 = hn::Zero(d), b1 = hn::Zero(d), b2 = hn::Zero(d), b3 = hn::Zero(d);
  for (int64_t i = 0; i < args.D; i += lanes) {
    if (token == 0) next.fetch(2 * static_cast<size_t>(lanes) * sizeof(float));
    const VF a = hn::LoadU(d, weight_a + i), b = hn::LoadU(d, weight_b + i);
    const VF of0 = hn::LoadU(d, x0 + i);
    a0 = hn::MulAdd(a, of0, a0), b0 = hn::MulAdd(b, of0, b0);
    if constexpr (kTokens > 1) {
      const VF of1 = hn::LoadU(d, x1 + i);
      a1 = hn::MulAdd(a, of1, a1), b1 = hn::MulAdd(b, of1, b1);
    }
    if constexpr (kTokens > 2) {
      const VF of2 = hn::LoadU(d, x2 + i);
      a2 = hn::MulAdd(a, of2, a2), b2 = hn::MulAdd(b, of2, b2);
    }
    if constexpr (kTokens > 3) {
      const VF of3 = hn::LoadU(d, x3 + i);
      a3 = hn::MulAdd(a, of3, a3), b3 = hn::MulAdd(b, of3, b3);
    }
  }
  write(args, token, first, a0), write(args, token, second, b0);
  if constexpr (kTokens > 1) write(args, token + 1, first, a1), write(args, token + 1, second, b1);
  if constexpr (kTokens > 2) write(args, token + 2, first, a2), write(args, token + 2, second, b2);
  if constexpr (kTokens > 3) write(args, token + 3, first, a3), write(args, token + 3, second, b3);
}

void multiply_pair(const LinearF32Args& args, int64_t first, int64_t second, NextBlock& next) {
  int64_t token = 0;
  for (; token + kTokensOfPair <= args.T; token += kTokensOfPair) multiply_pair<4>(args, first, second, token, next);
  switch (args.T - token) {
    case 3:
      return multiply_pair<3>(args, first, second, token, next);
    case 2:
      return multiply_pair<2>(args, first, second, token, next);
    case 1:
      return multiply_pair<1>(args, first, second, token, next);
    default:
      return;
  }
}

void linear_f32(const LinearF32Args& args, int64_t item, int64_t next_item) {
  const int64_t begin = item * kLinearF32Block, end = std::min(begin + kLinearF32Block, args.O);
  NextBlock next(args, next_item);
  for (int64_t output = begin; output < end; output += 2) {
    multiply_pair(args, output, std::min(output + 1, end - 1), next);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(linear_f32);

void linear_f32(const LinearF32Args& args, int64_t item, int64_t next_item) {
  HWY_DYNAMIC_DISPATCH(linear_f32)(args, item, next_item);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
