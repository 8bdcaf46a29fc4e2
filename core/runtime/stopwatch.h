// SPDX-License-Identifier: Apache-2.0
// Time since a moment.
#pragma once

#include <chrono>

namespace xgdn {

/// Starts when it is made.
class Stopwatch {
 public:
  /// Since then.
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

}  // namespace xgdn
