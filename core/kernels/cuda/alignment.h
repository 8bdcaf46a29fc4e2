// SPDX-License-Identifier: Apache-2.0
// Whether rows can be read in packets of 16 bytes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

template <class Rows>
bool is_aligned(const Rows& rows) {
  const int64_t elements = 16 / size_of(rows.dtype);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.token_stride % elements == 0 &&
         rows.head_stride % elements == 0;
}

}  // namespace xgdn::kernel::cuda
