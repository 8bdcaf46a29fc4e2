// SPDX-License-Identifier: Apache-2.0
// Rows of a table that the host names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace xgdn {

/// A copy [n, ...] of these rows of a table [R, ...], on its device.
at::Tensor select_rows(const at::Tensor& table, const std::vector<int64_t>& rows);

}  // namespace xgdn
