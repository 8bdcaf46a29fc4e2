// SPDX-License-Identifier: Apache-2.0
#include "core/layers/projection.h"

#include <ATen/ops/empty.h>

#include "core/kernels/ops_api.h"

namespace xgdn {

at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const std::string& backend,
                   const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> dtype) {
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options().dtype(dtype.value_or(x.scalar_type())));
  kernel::linear({.x = x, .weight = weight, .out = out, .bias = bias, .backend = backend});
  return out;
}

}  // namespace xgdn
