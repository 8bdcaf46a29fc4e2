// SPDX-License-Identifier: Apache-2.0
// What a full-attention layer needs to know about a step, and the pools it reads and writes. Filled by the runtime.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "core/kernels/ops_api.h"

namespace xgdn {

using kernel::AttentionSequence;

/// Index tensors are int32 on the layer's device.
struct AttentionBatch {
  at::Tensor positions;     // [T]  place of each token in its sequence
  at::Tensor kv_rows;       // [T]  block * block_size + offset: where each token's key and value go
  at::Tensor block_ids;     // [M]  the sequences' blocks, one after another
  at::Tensor context_rows;  // [C]  rows of the sequences' contexts, one after another; undefined on the CPU, which
                            //      reads whole blocks
  std::vector<AttentionSequence> sequences;
};

/// Keys and values of one layer: [num_blocks, block_size, Hkv, D] each.
struct KvPool {
  at::Tensor k;
  at::Tensor v;
};

}  // namespace xgdn
