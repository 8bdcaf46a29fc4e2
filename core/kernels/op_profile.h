// SPDX-License-Identifier: Apache-2.0
// Where the time of a thread's calls goes, op by op.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xgdn::kernel {

/// The calls of one op with sizes of one kind. On a device that computes asynchronously they end before it does.
struct OpTime {
  std::string op;
  std::vector<int64_t> sizes;  // of heads, experts or weights; not of tokens: see sizes_of in dispatch/op_recorder.h
  int64_t calls = 0;
  double seconds = 0.0;         // in the calls, with their checks
  double seconds_before = 0.0;  // from the end of the op before, or from the start, to each call
};

/// Begins to time the ops that this thread calls, and drops what it timed before.
void start_op_profile();

/// Ends it. Rows in the order of the first calls; none without a start.
std::vector<OpTime> stop_op_profile();

}  // namespace xgdn::kernel
