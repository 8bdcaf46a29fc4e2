// SPDX-License-Identifier: Apache-2.0
// A layer's decode step between its two projections on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

/// Work items are (sequence, key head); any thread may take any of them in any order.
inline int64_t num_work_items(const DecodeStepArgs& args) {
  return args.rule.H * args.rule.N;
}

/// K and V are multiples of 16, at most kMaxHeadDim.
void gdn_decode_step(const DecodeStepArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
