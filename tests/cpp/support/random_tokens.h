// SPDX-License-Identifier: Apache-2.0
// Prompts for tiny models.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace xgdn::testing {

/// The token whose embedding is NaN, where a test's model has one.
inline constexpr int32_t kNaNToken = 63;

/// `size` token ids below `vocab_size`, the same for the same seed.
inline std::vector<int32_t> random_tokens(uint64_t seed, int64_t size, uint64_t vocab_size = 64) {
  std::mt19937_64 generator(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(size));
  for (int32_t& token : tokens) token = static_cast<int32_t>(generator() % vocab_size);
  return tokens;
}

}  // namespace xgdn::testing
