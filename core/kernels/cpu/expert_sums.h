// SPDX-License-Identifier: Apache-2.0
// The weighted sum over a token's experts on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct ExpertSumsArgs {
  int64_t A = 0;
  int64_t D = 0;
  const int64_t* visits = nullptr;  // [T, A]  the row of `outputs` that a choice is
  InRows outputs;                   // [V, D]
  InRows weights;                   // [T, A]
  OutRows out;                      // [T, D]
};

void expert_sums(const ExpertSumsArgs& args, int64_t begin_token, int64_t end_token);

}  // namespace xgdn::kernel::cpu
