// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on the CPU in chunks of tokens, over pointers, strides and sizes: prefill.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"
#include "core/kernels/cpu/packed_product.h"

namespace xgdn::kernel::cpu {

/// K and V are multiples of 16.
struct ChunkGatedDeltaRuleArgs : DeltaRuleArgs {
  const bool* has_initial_state = nullptr;  // [N]  null: all true

  const BFloat16Products* products = nullptr;  // null: f32 products

  int64_t heads_per_item = 0;  // value heads: divides HV, and is a multiple or a divisor of HV / H
  int64_t v_block = 0;         // rows of S per work item, multiple of 16
};

/// Work items are (sequence, heads_per_item value heads, block of V rows); any thread may take any of them in any
/// order. A thread keeps scratch memory for one item, whatever the number of tokens: the item's states, in f32 and as
/// operands, and less than 1 MiB.
int64_t num_work_items(const ChunkGatedDeltaRuleArgs& args);

void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, int64_t item);

}  // namespace xgdn::kernel::cpu
