// SPDX-License-Identifier: Apache-2.0
// Who shares memory, against counting the bytes of every element.
#include "core/kernels/dispatch/memory.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <vector>

namespace xgdn::kernel::testing {
namespace {

/// Bytes of every element, from the storage's begin, one entry an element and byte.
std::vector<int64_t> bytes_of(const at::Tensor& t) {
  std::vector<int64_t> offsets{t.storage_offset()};
  for (int64_t d = 0; d < t.dim(); ++d) {
    std::vector<int64_t> further;
    for (int64_t i = 0; i < t.size(d); ++i) {
      for (const int64_t offset : offsets) further.push_back(offset + i * t.stride(d));
    }
    offsets = further;
  }
  std::vector<int64_t> bytes;
  for (const int64_t offset : offsets) {
    for (size_t b = 0; b < t.itemsize(); ++b) {
      bytes.push_back(offset * static_cast<int64_t>(t.itemsize()) + static_cast<int64_t>(b));
    }
  }
  return bytes;
}

class Views {
 public:
  explicit Views(uint64_t seed) : random_(seed) {}

  int64_t up_to(int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(random_); }

  /// A slice with steps of a permuted tensor that lies somewhere in `memory`.
  at::Tensor view(const at::Tensor& memory) {
    const int64_t rows = 1 + up_to(4), heads = 1 + up_to(3), width = 1 + up_to(6);
    at::Tensor t = memory.slice(0, up_to(60)).slice(0, 0, rows * heads * width).view({rows, heads, width});
    if (up_to(1) == 0) t = t.transpose(0, 1);
    for (int64_t d = 0; d < 3; ++d) {
      const int64_t first = up_to(t.size(d) - 1);
      t = t.slice(d, first, t.size(d), 1 + up_to(2));
    }
    return t;
  }

 private:
  std::mt19937_64 random_;
};

TEST(Memory, OverlapsWhereElementsShareBytes) {
  Views views(1);
  const at::Tensor words = at::empty({400}, at::kFloat);
  const at::Tensor halves = words.view(at::kBFloat16);
  int num_shared = 0, num_near = 0;
  for (int i = 0; i < 20000; ++i) {
    const at::Tensor a = views.view(words);
    const at::Tensor b = views.view(views.up_to(1) == 0 ? words : halves);
    const std::vector<int64_t> of_a = bytes_of(a), of_b = bytes_of(b);
    const std::set<int64_t> set(of_a.begin(), of_a.end());
    bool is_shared = false;
    for (const int64_t byte : of_b) is_shared |= set.contains(byte);
    num_shared += is_shared;
    num_near += !is_shared && of_a.front() < of_b.back() && of_b.front() < of_a.back();
    ASSERT_EQ(Memory(a).overlaps(Memory(b)), is_shared) << i << ": " << a.sizes() << a.strides() << a.storage_offset()
                                                        << " and " << b.sizes() << b.strides() << b.storage_offset();
    ASSERT_EQ(Memory(b).overlaps(Memory(a)), is_shared) << i;
    ASSERT_FALSE(overlapping_dim(a)) << a.sizes() << a.strides();
  }
  EXPECT_GT(num_shared, 1000);
  EXPECT_GT(num_near, 1000) << "views that interleave were hardly tried";
}

TEST(Memory, ElementsThatShareBytesAreFound) {
  Views views(2);
  const at::Tensor memory = at::empty({1000}, at::kFloat);
  int num_shared = 0;
  for (int i = 0; i < 20000; ++i) {
    const std::vector<int64_t> sizes{views.up_to(4), 1 + views.up_to(3), 1 + views.up_to(3)};
    const std::vector<int64_t> strides{views.up_to(20), views.up_to(8), views.up_to(3)};
    const at::Tensor t = memory.as_strided(sizes, strides);
    const std::vector<int64_t> bytes = bytes_of(t);
    const bool is_shared = std::set<int64_t>(bytes.begin(), bytes.end()).size() < bytes.size();
    num_shared += is_shared;
    if (is_shared) {
      ASSERT_TRUE(overlapping_dim(t)) << sizes << strides;
    }
  }
  EXPECT_GT(num_shared, 1000);
}

TEST(Memory, WhatIsReachedAndHeld) {
  at::Tensor t = at::empty({7, 4}, at::kFloat);
  EXPECT_EQ(bytes_reached(t.slice(0, 2, 5).slice(1, 1, 3)), (4 * 4 + 3) * 4);
  EXPECT_EQ(bytes_reached(t.slice(0, 7)), 0);
  EXPECT_EQ(bytes_held(t.slice(0, 2, 5)), 7 * 4 * 4);
  EXPECT_EQ(bytes_held(at::empty({7, 4}, at::TensorOptions().device(at::kMeta))), 7 * 4 * 4);
}

}  // namespace
}  // namespace xgdn::kernel::testing
