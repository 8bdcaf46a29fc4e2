// SPDX-License-Identifier: Apache-2.0
// The gated norm with the device's RMS norm.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// x and z have one type. Rounding: the norm to it, silu(z) to it, their product to the output's.
void run_rms_norm_gated(const RmsNormGatedParams& p);

}  // namespace xgdn::kernel::npu
