// SPDX-License-Identifier: Apache-2.0
// What a full-attention layer needs to know about a step, and the pools it reads and writes. Filled by the runtime.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/kernels/ops_api.h"

namespace xgdn {

/// Index tensors are int32 on the layer's device. All but the positions are undefined for a model without full
/// attention.
struct AttentionBatch {
  at::Tensor positions;                    // [T]     place of each token in its sequence
  at::Tensor slot_mapping;                 // [T]     block * block_size + offset: where its key and value go; kPadSlot
  at::Tensor block_table;                  // [N, M]  strided: the sequences' blocks
  at::Tensor context_lens;                 // [N]     tokens in the cache, those of the step included; 0: padding
  at::Tensor cu_seqlens;                   // [N+1]
  std::optional<at::Tensor> context_rows;  // [C]     where kernel::reads_context_rows
  kernel::HostFacts host;                  // the lengths, on the host
};

/// Keys and values of one layer: [num_blocks, block_size, Hkv, kernel::kv_row_size(D)] each.
struct KvPool {
  at::Tensor k;
  at::Tensor v;
};

}  // namespace xgdn
