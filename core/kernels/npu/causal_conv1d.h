// SPDX-License-Identifier: Apache-2.0
// The convolution of a plain decode step in six launches.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// One token a sequence without padding, on a slot of W - 1 rows in the type of x.
bool is_plain_update(const CausalConv1dUpdateParams& p, const ConvShape& s);

/// Rounding: products and sum in fp32, the sum to the input's type before the activation.
void run_plain_update(const CausalConv1dUpdateParams& p);

}  // namespace xgdn::kernel::npu
