// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/likeliest_logits.h"

#include <ATen/Parallel.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

namespace xgdn::kernel::aten {
namespace {

// A logit and its token as one integer, the larger the likelier. -0 counts as 0.
uint64_t key_of(float logit, uint32_t token) {
  const auto bits = std::bit_cast<uint32_t>(logit + 0.0f);
  constexpr uint32_t kSign = uint32_t{1} << 31;
  uint32_t ordered = (bits & kSign) != 0 ? ~bits : bits | kSign;
  if (std::isnan(logit)) ordered = std::numeric_limits<uint32_t>::max();
  return uint64_t{ordered} << 32 | ~token;
}

at::Tensor likeliest_on_host(const at::Tensor& logits, int64_t count) {
  const int64_t size = logits.size(1);
  at::Tensor found = at::empty({logits.size(0), 2, count}, at::kInt);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(static_cast<size_t>(size));
    for (int64_t row = begin; row < end; ++row) {
      const float* const of_row = logits.const_data_ptr<float>() + row * size;
      for (int64_t i = 0; i < size; ++i) keys[static_cast<size_t>(i)] = key_of(of_row[i], static_cast<uint32_t>(i));
      std::partial_sort(keys.begin(), keys.begin() + count, keys.end(), std::greater());
      int32_t* const out = found.mutable_data_ptr<int32_t>() + row * 2 * count;
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t token = ~static_cast<uint32_t>(keys[static_cast<size_t>(i)]);
        out[i] = std::bit_cast<int32_t>(of_row[token]);
        out[count + i] = static_cast<int32_t>(token);
      }
    }
  });
  return found;
}

}  // namespace

LargestLogits largest_logits(const at::Tensor& logits) {
  const at::Tensor tokens = at::argmax(logits, /*dim=*/1);  // the first of several, or the first NaN
  const at::Tensor values = logits.gather(1, tokens.unsqueeze(1)).squeeze(1);
  return {at::stack({tokens.to(at::kInt), values.view(at::kInt)})};
}

at::Tensor likeliest_logits(const at::Tensor& logits, int64_t count) {
  if (logits.is_cpu()) return likeliest_on_host(logits, count);
  const auto [values, tokens] = at::sort(logits, /*stable=*/true, /*dim=*/1, /*descending=*/true);
  return at::stack({values.narrow(1, 0, count).contiguous().view(at::kInt), tokens.narrow(1, 0, count).to(at::kInt)},
                   1);
}

}  // namespace xgdn::kernel::aten
