// SPDX-License-Identifier: Apache-2.0
// Gates of the delta rule on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops. A row is a token.
struct GdnGatingArgs {
  int64_t HV = 0;
  InRows a;        // [T, HV]
  InRows b;        // [T, HV]
  InRows A_log;    // [HV]
  InRows dt_bias;  // [HV]
  OutRows g;       // [T, HV]
  OutRows beta;    // [T, HV]
};

void gdn_gating(const GdnGatingArgs& args, int64_t begin_token, int64_t end_token);

}  // namespace xgdn::kernel::cpu
