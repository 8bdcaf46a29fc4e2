// SPDX-License-Identifier: Apache-2.0
// The mixture of experts composed from ATen, expert after expert: which are chosen is read on the host.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void moe_experts(const MoeExpertsParams& p, const ExpertsShape& s);

}  // namespace xgdn::kernel::aten
