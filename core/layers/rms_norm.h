// SPDX-License-Identifier: Apache-2.0
// The RMSNorm of the residual stream and of attention's queries and keys.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "core/layers/rotary.h"

namespace xgdn {

/// (1 + weight) * (x / rms(x)) over the last dimension of x [T, D] or [T, H, D], as kernel::rms_norm.
at::Tensor rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& weight, double eps, const std::string& backend);

/// The same of x [T, H, D], its first dimensions rotated to the tokens' positions.
at::Tensor rotary_rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& weight, const RotaryTable& rotary,
                                        double eps, const std::string& backend);

/// residual <- residual + x, both [T, D]; the norm of the sum.
at::Tensor add_rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                                     double eps, const std::string& backend);

}  // namespace xgdn
