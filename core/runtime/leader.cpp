// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/leader.h"

namespace xgdn {

void Leader::tell(const RankCommand& change) {
  if (!is_shut_down_) append_command(message_, change);
}

void Leader::send(const RankCommand& command) {
  if (is_shut_down_) throw RankError("[Leader] expected ranks that follow, got ranks that were shut down");
  check();
  append_command(message_, command);
  try {
    channel_.send(message_);
  } catch (const std::exception& error) {
    fail(error.what());
    throw;
  }
  message_.clear();
}

void Leader::check() const {
  if (const std::string failure = error(); !failure.empty()) throw RankError(failure);
}

void Leader::shut_down() noexcept {
  if (is_shut_down_) return;
  try {
    send(ShutDownCommand{});
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): ranks that have ended need not be told
  }
  is_shut_down_ = true;
}

std::string Leader::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Leader::fail(const std::string& error) {
  {
    const std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = error;
  }
  group_->end();
}

}  // namespace xgdn
