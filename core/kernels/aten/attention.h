// SPDX-License-Identifier: Apache-2.0
// Attention composed from ATen, one sequence after the other: right where a launch costs nothing.
#pragma once

#include <cstdint>

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

/// The sequences with more than so many tokens.
void attend_one_by_one(const PagedAttentionParams& p, int64_t more_than);

}  // namespace xgdn::kernel::aten
