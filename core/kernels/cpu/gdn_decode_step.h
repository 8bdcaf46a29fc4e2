// SPDX-License-Identifier: Apache-2.0
// A layer's decode step between its two projections on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/cpu/causal_conv1d.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule.h"
#include "core/kernels/cpu/rms_norm_gated.h"

namespace xgdn::kernel::cpu {

/// The ops that the step consists of. What one hands to the next is not in memory: conv.out, rule.q, rule.k, rule.v and
/// norm.x are absent, of rule.out only the type counts, to which o is rounded.
struct GdnDecodeStepArgs {
  CausalConv1dArgs conv;             // one token a sequence
  RecurrentGatedDeltaRuleArgs rule;  // with A_log: g and beta are logits
  RmsNormGatedArgs norm;
};

/// Work items are (key head, sequence), sequences fastest.
inline int64_t num_work_items(const GdnDecodeStepArgs& args) {
  return args.rule.H * args.rule.N;
}

void gdn_decode_step(const GdnDecodeStepArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
