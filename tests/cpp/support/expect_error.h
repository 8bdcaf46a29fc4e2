// SPDX-License-Identifier: Apache-2.0
// The check that a call throws one type of error with the right words.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <initializer_list>
#include <string_view>

namespace xgdn::testing {

/// Runs `call` and expects an E whose message holds every word.
template <typename E>
void expect_error(const std::function<void()>& call, std::initializer_list<std::string_view> words) {
  try {
    call();
  } catch (const E& error) {
    const std::string_view message = error.what();
    for (const std::string_view word : words) {
      EXPECT_NE(message.find(word), message.npos) << "no \"" << word << "\" in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected a message with " << *words.begin();
}

}  // namespace xgdn::testing
