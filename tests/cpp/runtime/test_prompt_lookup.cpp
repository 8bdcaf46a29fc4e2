// SPDX-License-Identifier: Apache-2.0
// What a sequence's own text proposes.
#include "core/runtime/prompt_lookup.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace xgdn::testing {
namespace {

using Tokens = std::vector<int32_t>;

TEST(PromptLookup, WhatFollowedTheLastTokens) {
  EXPECT_EQ(look_up_drafts(Tokens{1, 2, 3, 4, 9, 1, 2}, 3), (Tokens{3, 4, 9}));
  EXPECT_EQ(look_up_drafts(Tokens{1, 2, 3, 4, 9, 1, 2}, 10), (Tokens{3, 4, 9, 1, 2})) << "no more than there are";
  EXPECT_EQ(look_up_drafts(Tokens{7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2}, 1), Tokens{5}) << "three tokens before two";
  EXPECT_EQ(look_up_drafts(Tokens{1, 2, 5, 0, 1, 2, 6, 0, 9, 1, 2}, 1), Tokens{6}) << "the latest of equal ones";
  EXPECT_EQ(look_up_drafts(Tokens{4, 4, 4, 4}, 2), (Tokens{4})) << "it may overlap";
}

TEST(PromptLookup, NothingFromNothing) {
  EXPECT_TRUE(look_up_drafts(Tokens{}, 4).empty());
  EXPECT_TRUE(look_up_drafts(Tokens{1, 2}, 4).empty());
  EXPECT_TRUE(look_up_drafts(Tokens{1, 2, 3, 4, 5}, 4).empty());
  EXPECT_TRUE(look_up_drafts(Tokens{1, 5, 2, 5}, 4).empty()) << "one token is not enough";
  EXPECT_TRUE(look_up_drafts(Tokens{1, 2, 3, 1, 2}, 0).empty());
}

// Against the definition.
TEST(PromptLookup, TheLongestOccurrenceOfRandomTexts) {
  std::mt19937_64 generator(1);
  for (int i = 0; i < 2000; ++i) {
    Tokens tokens(generator() % 30);
    for (int32_t& token : tokens) token = static_cast<int32_t>(generator() % 3);
    Tokens want;
    for (int64_t length = 4; length >= 2 && want.empty(); --length) {
      if (std::ssize(tokens) <= length) continue;
      const auto last = tokens.end() - length;
      for (auto begin = last - 1; begin >= tokens.begin(); --begin) {
        if (!std::equal(last, tokens.end(), begin)) continue;
        const auto follows = begin + length;
        want.assign(follows, follows + std::min<int64_t>(5, tokens.end() - follows));
        break;
      }
    }
    ASSERT_EQ(look_up_drafts(tokens, 5), want);
  }
}

}  // namespace
}  // namespace xgdn::testing
