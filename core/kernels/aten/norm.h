// SPDX-License-Identifier: Apache-2.0
// The norms composed from ATen, for any device.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void l2_norm(const L2NormParams& p);
void rms_norm_gated(const RmsNormGatedParams& p);
void rms_norm(const RmsNormParams& p);

}  // namespace xgdn::kernel::aten
