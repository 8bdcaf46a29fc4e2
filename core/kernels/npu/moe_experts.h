// SPDX-License-Identifier: Apache-2.0
// The mixture of experts with torch_npu's routing and grouped products: the routing stays on the device, and nothing
// depends on how many experts are chosen.
#pragma once

#include <optional>
#include <string>

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// nullopt: the ops' documented limits hold; else a sentence.
std::optional<std::string> why_not_experts(const ExpertsShape& s);

void run_experts(const MoeExpertsParams& p, const ExpertsShape& s);

}  // namespace xgdn::kernel::npu
