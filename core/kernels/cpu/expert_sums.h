// SPDX-License-Identifier: Apache-2.0
// The last product of a mixture's experts with the weighted sum over those of a token.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"
#include "core/kernels/cpu/expert_products.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct ExpertSumsArgs {
  int64_t T = 0;
  int64_t A = 0;
  int64_t D = 0;
  const ExpertVisits* visits = nullptr;
  const ExpertProduct* down = nullptr;
  InRows weights;  // [T, A]
  OutRows out;     // [T, D]
};

inline int64_t num_work_items(const ExpertSumsArgs& args) {
  return args.D / kExpertBlock;
}

/// Computes blocks of outputs for all tokens.
void expert_sums(const ExpertSumsArgs& args, int64_t begin_item, int64_t end_item);

}  // namespace xgdn::kernel::cpu
