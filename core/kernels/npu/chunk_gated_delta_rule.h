// SPDX-License-Identifier: Apache-2.0
// Prefill with the chunk op, which takes initial states and returns final ones.
#pragma once

#include <optional>
#include <string>

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// nullopt: the op's documented limits hold, and those that the probe found; else a sentence.
std::optional<std::string> why_not_chunk(const ChunkGatedDeltaRuleParams& p, const GdnShape& s);

void run_chunk(const ChunkGatedDeltaRuleParams& p, const GdnShape& s);

}  // namespace xgdn::kernel::npu
