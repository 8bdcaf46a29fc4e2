// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on the CPU over pointers, strides and sizes: recurrent_gated_delta_rule, and packed_decode,
// which is the same on one token a sequence with the gates as logits.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

/// K and V are multiples of 16, at most kMaxHeadDim.
struct RecurrentGatedDeltaRuleArgs : TokenDeltaRuleArgs {
  int64_t v_block = 0;  // rows of S per work item, multiple of 16
};

inline constexpr int64_t kHeadDimStep = 16;
inline constexpr int64_t kMaxHeadDim = 256;

/// Work items are (sequence, value head, block of V rows), blocks fastest; any thread may take any of them in any
/// order.
inline int64_t num_work_items(const RecurrentGatedDeltaRuleArgs& args) {
  return args.N * args.HV * ((args.V + args.v_block - 1) / args.v_block);
}

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
