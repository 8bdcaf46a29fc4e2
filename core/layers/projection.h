// SPDX-License-Identifier: Apache-2.0
// A product with a layer's weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace xgdn {

/// x weight^T + bias of x [T, D] and weight [O, D], as kernel::linear, in the dtype of x or in `dtype`.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const std::string& backend,
                   const std::optional<at::Tensor>& bias = {}, std::optional<at::ScalarType> dtype = {});

}  // namespace xgdn
