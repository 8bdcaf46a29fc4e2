// SPDX-License-Identifier: Apache-2.0
// The mixture of experts composed from ATen, expert after expert: which are chosen is read on the host.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::aten {

void moe_experts(const MoeExpertsParams& p, const ExpertsShape& s);

/// The same call with plain weights, made anew.
MoeExpertsParams with_plain_weights(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s);

/// Multiplies by the backend's own quantized_linear, and gates by its silu_and_mul.
void quantized_moe_experts(const Backend& backend, const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s);

}  // namespace xgdn::kernel::aten
