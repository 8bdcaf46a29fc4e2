// SPDX-License-Identifier: Apache-2.0
// The chunk metadata of a prefill step as vllm-ascend's kernels read it, from what its builder starts with.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "core/kernels/ops_api.h"

namespace xllm::kernel::gdn {

/// Makes the six tensors from the offsets of the sequences, [N+1] i32 or i64 on the host, the value heads of the model
/// and the number of ranks that share them. As vllm-ascend's: index tables in the type of cu_seqlens, offsets and final
/// indices i64. Its own tables carry compact ranks (SequenceIds::kCompactRanks), of which empty sequences have none;
/// kTrue writes the number of the sequence. Throws xgdn's errors, and ShapeError where the ranks do not divide the
/// heads.
::xgdn::kernel::ChunkMetadata chunked_prefill_metadata(const at::Tensor& cu_seqlens_cpu, int64_t num_value_heads,
                                                       int64_t tensor_parallel_size, ::xgdn::kernel::SequenceIds ids,
                                                       at::Device device);

}  // namespace xllm::kernel::gdn
