// SPDX-License-Identifier: Apache-2.0
// A mutex that serves threads in the order in which they came.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace xgdn {

/// For work that threads do again and again, such as steps: a thread that unlocks and locks at once would keep a
/// std::mutex from those that wait. Lockable as std::lock_guard wants it.
class TurnMutex {
 public:
  /// Waits for all that have asked before.
  void lock() {
    std::unique_lock lock(mutex_);
    const uint64_t turn = next_turn_++;
    changed_.wait(lock, [&] { return turn == current_turn_; });
  }

  /// The next one's turn.
  void unlock() {
    {
      const std::lock_guard lock(mutex_);
      ++current_turn_;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_turn_ = 0;
  uint64_t current_turn_ = 0;
};

}  // namespace xgdn
