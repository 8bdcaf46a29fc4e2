// SPDX-License-Identifier: Apache-2.0
// Gates of the delta rules, with fewer launches than their composition.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// g = -exp(A_log) softplus(a + dt_bias), fp32.
at::Tensor log_decay(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias);

void run_gating(const GdnGatingParams& p);

}  // namespace xgdn::kernel::npu
