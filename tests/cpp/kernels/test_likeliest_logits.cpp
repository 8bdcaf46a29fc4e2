// SPDX-License-Identifier: Apache-2.0
// The likeliest tokens of rows, against a sort of each row: ties, NaNs, infinities and both zeros.
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/kernels/device.h"

namespace xgdn::kernel {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// All tokens of a row, the likeliest first.
std::vector<int32_t> sorted_tokens(const float* row, int64_t size) {
  std::vector<int32_t> tokens(static_cast<size_t>(size));
  std::iota(tokens.begin(), tokens.end(), 0);
  std::ranges::stable_sort(
      tokens, [row](int32_t x, int32_t y) { return std::isnan(row[x]) ? !std::isnan(row[y]) : row[x] > row[y]; });
  return tokens;
}

std::vector<at::Tensor> tables() {
  at::Tensor special = at::randint(-3, 3, {5, 700}, at::kFloat);
  special[0][17] = std::numeric_limits<float>::quiet_NaN();
  special[0][400] = -std::numeric_limits<float>::quiet_NaN();
  special[1][5] = kInfinity;
  special[2].fill_(-kInfinity);
  special[3].fill_(-0.0f);
  special[3][600] = 0.0f;
  return {at::randn({7, 1000}), special, at::randn({1, 20'003}), at::randn({3, 1}), at::zeros({2, 5000})};
}

TEST(LikeliestLogits, AreTheFirstOfTheSortedRow) {
  for (const at::Tensor& logits : tables()) {
    const int64_t size = logits.size(1);
    const LargestLogits largest = largest_logits(logits);
    for (const int64_t wanted : {int64_t{1}, int64_t{2}, int64_t{20}, kMostLikeliest}) {
      const int64_t count = std::min(wanted, size);
      const at::Tensor found = likeliest_logits(logits, count);
      ASSERT_EQ(found.sizes(), at::IntArrayRef({logits.size(0), 2, count}));
      for (int64_t r = 0; r < logits.size(0); ++r) {
        const float* const row = logits.const_data_ptr<float>() + r * size;
        const int32_t* const bits = found.const_data_ptr<int32_t>() + r * 2 * count;
        const std::vector<int32_t> want = sorted_tokens(row, size);
        for (int64_t i = 0; i < count; ++i) {
          ASSERT_EQ(bits[count + i], want[static_cast<size_t>(i)]) << "row " << r << ", place " << i << " of " << count;
          ASSERT_EQ(bits[i], std::bit_cast<int32_t>(row[want[static_cast<size_t>(i)]]));
        }
        EXPECT_EQ(largest.tokens()[r].item<int32_t>(), want.front());
        EXPECT_EQ(std::bit_cast<int32_t>(largest.values()[r].item<float>()), std::bit_cast<int32_t>(row[want.front()]));
      }
    }
  }
}

}  // namespace
}  // namespace xgdn::kernel
