// SPDX-License-Identifier: Apache-2.0
// How the cpu backend spreads work items over ATen's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace xgdn::kernel::cpu {

/// How many threads `elements` are worth: below this many elements a thread costs more than it brings.
inline int64_t threads_for(int64_t elements) {
  constexpr int64_t kElementsPerThread = 16384;
  return std::clamp<int64_t>(elements / kElementsPerThread, 1, at::get_num_threads());
}

/// Calls f(begin, end) over `count` items. Threads take ranges as they come: items differ in length, threads are
/// disturbed. Ranges of several items, at least `least`, let a thread read ahead from one item to the next.
template <class F>
void parallel_dynamic(int64_t threads, int64_t count, const F& f, int64_t least = 1) {
  constexpr int64_t kRangesPerThread = 16;
  const int64_t range = std::max(count / (threads * kRangesPerThread), least);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(range, std::memory_order_relaxed)) < count;) {
      f(begin, std::min(begin + range, count));
    }
  });
}

/// Calls f(item, next) over `count` items as threads take them. A thread knows what it takes afterwards, `count` or
/// more for nothing, so that it can fetch it meanwhile.
template <class F>
void parallel_ahead(int64_t threads, int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    int64_t following = next.fetch_add(1, std::memory_order_relaxed);
    for (int64_t item = following; item < count; item = following) {
      following = next.fetch_add(1, std::memory_order_relaxed);
      f(item, following);
    }
  });
}

/// Calls f(begin, end) over `count` items of `elements` each, one range for each thread.
template <class F>
void parallel_ranges(int64_t count, int64_t elements, const F& f) {
  const int64_t threads = threads_for(count * elements);
  at::parallel_for(0, count, std::max<int64_t>((count + threads - 1) / threads, 1), f);
}

}  // namespace xgdn::kernel::cpu
