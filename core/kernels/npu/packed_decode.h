// SPDX-License-Identifier: Apache-2.0
// Packed decode: gates by their own ops, then the recurrent op.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

void run_packed_decode(const PackedDecodeParams& p, const GdnShape& s);

}  // namespace xgdn::kernel::npu
