// SPDX-License-Identifier: Apache-2.0
// The values inside index tensors, for callers that did not make them.
#pragma once

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// Throws RangeError with the op's name. The tensors are on the host.
class IndexChecker {
 public:
  explicit IndexChecker(std::string_view op) : op_(op) {}

  void cu_seqlens(const at::Tensor& t, int64_t num_tokens) const {
    const int32_t* v = t.data_ptr<int32_t>();
    const int64_t n = t.numel();
    if (v[0] != 0) fail("cu_seqlens", "to start at 0", v[0], 0);
    for (int64_t i = 1; i < n; ++i) {
      if (v[i] < v[i - 1]) fail("cu_seqlens", c10::str("values that never fall (", v[i - 1], " before)"), v[i], i);
    }
    if (v[n - 1] != num_tokens) fail("cu_seqlens", c10::str("to end at T=", num_tokens), v[n - 1], n - 1);
  }

  void lengths(const at::Tensor& cu_seqlens, std::string_view limit, int64_t most) const {
    const int32_t* cu = cu_seqlens.data_ptr<int32_t>();
    for (int64_t n = 0; n + 1 < cu_seqlens.numel(); ++n) {
      const int64_t length = cu[n + 1] - cu[n];
      if (length > most) fail("cu_seqlens", c10::str("sequences of at most ", limit, "=", most, " tokens"), length, n);
    }
  }

  void slots(std::string_view arg, const at::Tensor& t, int64_t num_slots, bool may_have_padding = true) const {
    const std::string a_slot = c10::str("a slot 0..", num_slots - 1);
    if (may_have_padding)
      return range(arg, t, kPadSlot, num_slots - 1, c10::str(a_slot, " or ", kPadSlot, " for padding"));
    range(arg, t, 0, num_slots - 1, c10::str(a_slot, " (may_have_padding is false)"));
  }

  void range(std::string_view arg, const at::Tensor& t, int64_t low, int64_t high, const std::string& what) const {
    if (t.scalar_type() == at::kLong) return range_of<int64_t>(arg, t, low, high, what);
    range_of<int32_t>(arg, t, low, high, what);
  }

  void range_of_ones(std::string_view arg, const at::Tensor& t) const {
    const int32_t* v = t.data_ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (v[i] != i) fail(arg, "0, 1, ..., N: one token a sequence", v[i], i);
    }
  }

  // No entry but kPadSlot may stand twice. Costs nothing that grows with what the entries name.
  void written_once(std::string_view arg, const at::Tensor& writes, std::string_view what) const {
    const int32_t* w = writes.const_data_ptr<int32_t>();
    std::vector<int64_t> order(static_cast<size_t>(writes.numel()));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return w[a] < w[b]; });
    for (size_t i = 1; i < order.size(); ++i) {
      const int64_t first = order[i - 1];
      const int64_t second = order[i];
      if (w[first] != w[second] || w[second] == kPadSlot) continue;
      fail(arg, c10::str("each ", what, " to be written once (entry ", first, " names it too)"), w[second], second);
    }
  }

  // No slot may be written twice, nor written by one sequence and read by another.
  void writes(std::string_view arg, const at::Tensor& writes, std::string_view reads_arg, const at::Tensor& reads,
              int64_t num_slots) const {
    const int32_t* r = reads.data_ptr<int32_t>();
    const int32_t* w = writes.data_ptr<int32_t>();
    std::vector<int64_t> writer(static_cast<size_t>(num_slots), -1);
    for (int64_t i = 0; i < writes.numel(); ++i) {
      if (w[i] == kPadSlot || r[i] == kPadSlot) continue;
      if (writer[w[i]] >= 0)
        fail(arg, c10::str("each slot to be written once (row ", writer[w[i]], " writes it too)"), w[i], i);
      writer[w[i]] = i;
    }
    for (int64_t i = 0; i < reads.numel(); ++i) {
      if (r[i] == kPadSlot) continue;
      const int64_t other = writer[r[i]];
      if (other >= 0 && other != i) {
        fail(reads_arg, c10::str("a slot that no other row writes (row ", other, " does)"), r[i], i);
      }
    }
  }

  [[noreturn]] void fail(std::string_view arg, const std::string& expected, int64_t got, int64_t index) const {
    throw RangeError(c10::str("[", op_, "] ", arg, ": expected ", expected, ", got ", got, " at index ", index));
  }

 private:
  template <typename Index>
  void range_of(std::string_view arg, const at::Tensor& t, int64_t low, int64_t high, const std::string& what) const {
    const Index* v = t.const_data_ptr<Index>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (v[i] < low || v[i] > high) fail(arg, what, v[i], i);
    }
  }

  std::string_view op_;
};

template <typename Params>
void check_pool_slots(const IndexChecker& c, const Params& p, int64_t num_slots) {
  c.slots("state_indices", p.state_indices, num_slots);
  if (p.write_indices) c.slots("write_indices", *p.write_indices, num_slots);
}

// The slots have been checked. `writes`: what is written of those that write_indices or, by default, state_indices
// name.
template <typename Params>
void check_pool_writes(const IndexChecker& c, const Params& p, const at::Tensor& writes, int64_t num_slots) {
  c.writes(p.write_indices ? "write_indices" : "state_indices", writes, "state_indices", p.state_indices, num_slots);
}

template <typename Params>
void check_pool_indices(const IndexChecker& c, const Params& p, int64_t num_slots) {
  check_pool_slots(c, p, num_slots);
  check_pool_writes(c, p, p.write_indices.value_or(p.state_indices), num_slots);
}

}  // namespace xgdn::kernel
