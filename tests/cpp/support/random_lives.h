// SPDX-License-Identifier: Apache-2.0
// Tensors that come and go.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

namespace xgdn::testing {

/// Every tensor of up to 20 keeps what is written into it, whatever comes and goes beside it. `allocate` takes bytes.
template <class F>
void expect_no_overlap(const F& allocate) {
  std::mt19937 random(1);
  std::vector<at::Tensor> alive;
  for (int i = 0; i < 20'000; ++i) {
    if (alive.size() < 20 && random() % 5 < 3) {
      const auto mark = static_cast<uint8_t>(random());
      alive.push_back(allocate(1 + random() % (random() % 8 == 0 ? 20'000 : 500)));
      std::memset(alive.back().mutable_data_ptr(), mark, alive.back().nbytes());
    } else if (!alive.empty()) {
      std::swap(alive[random() % alive.size()], alive.back());
      const auto* data = alive.back().const_data_ptr<uint8_t>();
      ASSERT_TRUE(std::all_of(data, data + alive.back().numel(), [&](uint8_t byte) { return byte == *data; }));
      alive.pop_back();
    }
    if (random() % 500 == 0) alive.clear();
  }
}

}  // namespace xgdn::testing
