// SPDX-License-Identifier: Apache-2.0
// Slots of state pools by ATen, for any device.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

/// Two launches a pool, beside those that take the padding out, once for all pools.
void copy_slots(const CopySlotsParams& p, const SlotsShape& s);

}  // namespace xgdn::kernel::aten
