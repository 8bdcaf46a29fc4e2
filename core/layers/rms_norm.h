// SPDX-License-Identifier: Apache-2.0
// The RMSNorm of the residual stream and of attention's queries and keys.
#pragma once

#include <ATen/core/Tensor.h>

namespace xgdn {

/// x / rms(x) * (1 + weight) over the last dimension, in fp32, rounded once (the checkpoints store weight around zero).
at::Tensor rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace xgdn
