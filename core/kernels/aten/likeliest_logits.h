// SPDX-License-Identifier: Apache-2.0
// The largest numbers of each row, for devices without a kernel of their own for them.
#pragma once

#include "core/kernels/device.h"

namespace xgdn::kernel::aten {

/// As kernel::largest_logits, on any device.
LargestLogits largest_logits(const at::Tensor& logits);

/// As kernel::likeliest_logits, on any device.
at::Tensor likeliest_logits(const at::Tensor& logits, int64_t count);

}  // namespace xgdn::kernel::aten
