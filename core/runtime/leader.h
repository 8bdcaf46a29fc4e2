// SPDX-License-Identifier: Apache-2.0
// Rank 0's side of a model that several ranks share: what it does, the others are told, in the same order.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "core/runtime/rank_command.h"

namespace xgdn {

/// Tells the ranks that follow. Changes of the pools outside of steps go with the next command that all ranks execute
/// together, so that a step is one broadcast. An exchange that fails half way leaves ranks that wait for each other:
/// none is begun after it.
///
/// For one thread at a time, except for error() and fail().
class Leader {
 public:
  /// Of rank 0 of that group.
  explicit Leader(std::shared_ptr<ProcessGroup> group) : group_(std::move(group)), channel_(*group_) {}

  /// Of all ranks.
  ProcessGroup& group() { return *group_; }

  /// A change that rank 0 makes as well, told before the next exchange.
  void tell(const RankCommand& change);

  /// Sends a command and runs rank 0's part of it, which waits for what the others compute. Whatever `f` throws is
  /// thrown on, and is the last thing that these ranks do. Throws RankError after such an end, and where one is known
  /// of by then.
  template <class F>
  auto exchange(const RankCommand& command, const F& f) {
    send(command);
    try {
      if constexpr (std::is_void_v<std::invoke_result_t<F>>) {
        f();
        check();
      } else {
        auto result = f();
        check();
        return result;
      }
    } catch (const std::exception& error) {
      fail(error.what());
      throw;
    }
  }

  /// The others return from following, unless an exchange has failed. Never throws.
  void shut_down() noexcept;

  /// A number for blocks that are kept on every rank.
  int64_t next_id() { return next_id_++; }

  /// Why nothing is exchanged any more; empty: all is well.
  std::string error() const;
  /// Says so, unless something has failed before.
  void fail(const std::string& error);

 private:
  void send(const RankCommand& command);
  void check() const;  // what came of ranks that have ended in the meantime is nobody's result

  std::shared_ptr<ProcessGroup> group_;
  CommandChannel channel_;
  std::vector<int32_t> message_;  // not sent yet
  int64_t next_id_ = 0;
  bool is_shut_down_ = false;
  mutable std::mutex mutex_;
  std::string error_;
};

}  // namespace xgdn
