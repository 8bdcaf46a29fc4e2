// SPDX-License-Identifier: Apache-2.0
// Quotients of small numbers by one that the host knows.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cuda {

struct Divisor {
  uint32_t value;
  uint32_t inverse;  // 2^32 / value, rounded up

  explicit Divisor(uint32_t divisor) : value(divisor), inverse(UINT32_MAX / divisor + 1) {}
  __device__ int quotient(int x) const { return value == 1 ? x : __umulhi(x, inverse); }
};

}  // namespace xgdn::kernel::cuda
