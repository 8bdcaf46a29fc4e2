// SPDX-License-Identifier: Apache-2.0
// What stands around the delta rules composed from ATen, for any device, and the fused decode ops from those that
// `backend` has. The delta rules themselves have no composition.
#pragma once

#include <optional>
#include <string>

#include "core/kernels/backend.h"

namespace xgdn::kernel::aten {

void gdn_gating(const GdnGatingParams& p);
void packed_decode(const Backend& backend, const PackedDecodeParams& p, const GdnShape& s);

/// The first sentence of the ops that the step consists of.
std::optional<std::string> why_not_decode_step(const Backend& backend, const GdnDecodeStepParams& p,
                                               const DecodeStepShape& s);
void gdn_decode_step(const Backend& backend, const GdnDecodeStepParams& p, const DecodeStepShape& s);

}  // namespace xgdn::kernel::aten
