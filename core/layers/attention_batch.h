// SPDX-License-Identifier: Apache-2.0
// What a full-attention layer needs to know about a step, and the pools it reads and writes. Filled by the runtime.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace xgdn {

/// One sequence of the step. Its blocks are block_ids[block_begin, block_begin + num_blocks).
struct AttentionSequence {
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
  int64_t context_len = 0;  // tokens in the cache after this step's are written
  int64_t block_begin = 0;
  int64_t num_blocks = 0;
};

/// Index tensors are int32 on the layer's device.
struct AttentionBatch {
  at::Tensor positions;  // [T]  place of each token in its sequence
  at::Tensor kv_rows;    // [T]  block * block_size + offset: where each token's key and value go
  at::Tensor block_ids;  // [B]  the sequences' blocks, one after another
  std::vector<AttentionSequence> sequences;
};

/// Keys and values of one layer: [num_blocks, block_size, Hkv, D] each.
struct KvPool {
  at::Tensor k;
  at::Tensor v;
};

}  // namespace xgdn
