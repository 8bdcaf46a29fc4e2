// SPDX-License-Identifier: Apache-2.0
// The convolutions composed from ATen, for any device: nothing is read on the host, no loop over sequences.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void causal_conv1d(const CausalConv1dParams& p, const ConvShape& s);
void causal_conv1d_update(const CausalConv1dUpdateParams& p, const ConvShape& s);

}  // namespace xgdn::kernel::aten
