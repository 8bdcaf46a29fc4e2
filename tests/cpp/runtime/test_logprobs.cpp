// SPDX-License-Identifier: Apache-2.0
// Log probabilities against log_softmax in double.
#include "core/runtime/logprobs.h"

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace xgdn::testing {
namespace {

TEST(Logprobs, AreTheLogSoftmax) {
  const at::Tensor logits = at::randn({500}).mul(10);
  const at::Tensor want = at::log_softmax(logits.to(at::kDouble), 0);
  const Logprobs got = logprobs({logits.const_data_ptr<float>(), 500}, 123, 20);
  EXPECT_NEAR(got.chosen, want[123].item<double>(), 1e-12);
  ASSERT_EQ(got.top.size(), 20u);
  const auto [values, tokens] = want.sort(/*dim=*/0, /*descending=*/true);
  for (int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(got.top[i].token, tokens[i].item<int64_t>());
    EXPECT_NEAR(got.top[i].logprob, values[i].item<double>(), 1e-12);
  }
}

// Of the size of a model's vocabulary, flat and peaked.
TEST(Logprobs, AreTheLogSoftmaxOfALargeVocabulary) {
  for (const double size : {0.5, 20.0}) {
    const at::Tensor logits = at::randn({248320}).mul(size);
    const at::Tensor want = at::log_softmax(logits.to(at::kDouble), 0);
    const Logprobs got = logprobs({logits.const_data_ptr<float>(), 248320}, 200001, 20);
    EXPECT_NEAR(got.chosen, want[200001].item<double>(), 1e-12);
    const auto [values, tokens] = want.topk(20);
    ASSERT_EQ(got.top.size(), 20u);
    for (int64_t i = 0; i < 20; ++i) {
      EXPECT_EQ(logits[got.top[i].token].item<float>(), logits[tokens[i].item<int64_t>()].item<float>());
      EXPECT_NEAR(got.top[i].logprob, values[i].item<double>(), 1e-12);
    }
  }
}

TEST(Logprobs, EqualOnesComeByTokenId) {
  const std::vector<float> logits{1, 3, 3, 0, 3};
  const Logprobs got = logprobs(logits, 3, 3);
  EXPECT_EQ(got.top[0].token, 1);
  EXPECT_EQ(got.top[1].token, 2);
  EXPECT_EQ(got.top[2].token, 4);
  EXPECT_EQ(got.top[0].logprob, got.top[2].logprob);
  EXPECT_NEAR(got.chosen - got.top[0].logprob, -3.0, 1e-12);
}

TEST(Logprobs, HoldForHugeLogitsAndFewTokens) {
  const std::vector<float> logits{3e38F, -3e38F, -std::numeric_limits<float>::infinity()};
  const Logprobs got = logprobs(logits, 0, 20);
  EXPECT_EQ(got.chosen, 0.0);
  ASSERT_EQ(got.top.size(), 3u);
  EXPECT_EQ(got.top[2].logprob, -std::numeric_limits<double>::infinity());
  EXPECT_TRUE(logprobs(logits, 0, 0).top.empty());
}

}  // namespace
}  // namespace xgdn::testing
