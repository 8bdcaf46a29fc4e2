// SPDX-License-Identifier: Apache-2.0
// Gates of the delta rule on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

void gdn_gating(const GdnGatingArgs& args, int64_t begin_token, int64_t end_token);

}  // namespace xgdn::kernel::cpu
