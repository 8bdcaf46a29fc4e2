// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/prompt_lookup.h"

#include <algorithm>

namespace xgdn {
namespace {

constexpr int64_t kLongest = 4;
constexpr int64_t kShortest = 2;

}  // namespace

std::vector<int32_t> look_up_drafts(std::span<const int32_t> tokens, int64_t most) {
  const auto count = std::ssize(tokens);
  int64_t longest = 0;  // of the occurrences so far
  int64_t found = 0;    // where what follows begins
  // From the latest one back, each end of an occurrence is compared backwards as far as it agrees.
  for (int64_t end = count - 1; most > 0 && end >= kShortest && longest < kLongest; --end) {
    int64_t length = 0;
    while (length < kLongest && length < end && tokens[end - 1 - length] == tokens[count - 1 - length]) ++length;
    if (length >= kShortest && length > longest) longest = length, found = end;
  }
  if (longest == 0) return {};
  const int64_t num_drafts = std::min(most, count - found);
  return {tokens.begin() + found, tokens.begin() + found + num_drafts};
}

}  // namespace xgdn
