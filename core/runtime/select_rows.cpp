// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/select_rows.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>

namespace xgdn {

at::Tensor select_rows(const at::Tensor& table, const std::vector<int64_t>& rows) {
  return at::index_select(table, 0, at::tensor(rows, at::kLong).to(table.device()));
}

}  // namespace xgdn
