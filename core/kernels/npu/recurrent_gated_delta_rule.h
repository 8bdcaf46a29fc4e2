// SPDX-License-Identifier: Apache-2.0
// Decode and verification with the recurrent op, which reads and writes one slot per token.
#pragma once

#include <optional>
#include <string>

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// nullopt: the op takes these types and sizes; else a sentence.
std::optional<std::string> why_not_recurrent(const at::Tensor& in, const at::Tensor& state, const GdnShape& s);
std::optional<std::string> why_not_recurrent(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s);

void run_recurrent(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s);

/// Whether the op does exactly what the call does: no slot is staged, and cu_seqlens is not read on the device.
bool is_in_place(const RecurrentGatedDeltaRuleParams& p);

}  // namespace xgdn::kernel::npu
