// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on CUDA in chunks of 64 tokens, on tensor cores: prefill.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// T is the number of rows of q, k, v and out. M is the number of rows of chunk_indices; a row below 0 names no chunk.
struct ChunkGatedDeltaRuleArgs : DeltaRuleArgs {
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  const int32_t* ends = nullptr;            // [N]  where sequences end that begin at cu_seqlens
  bool shows_overflow = false;              // a final state that is not finite makes the last output NaN, in its rows

  int64_t T = 0;
  int64_t M = 0;
  int64_t max_len = 0;                     // tokens of the longest sequence, or more
  const int32_t* chunk_indices = nullptr;  // [M, 2]
  const int32_t* chunk_offsets = nullptr;  // [N+1]

  void* workspace = nullptr;  // workspace_bytes(args), 16-byte aligned
};

/// Whether there is a kernel for heads of these sizes on the current device.
bool chunk_supports(int64_t K, int64_t V);

/// Bytes of scratch memory; depends on sizes alone. 11 KiB a chunk and value head, and for each cut that there may be
/// a state and a map in f32, of each value head: with K = V = 128 less than the former, for cuts are 16 chunks apart.
size_t workspace_bytes(const ChunkGatedDeltaRuleArgs& args);

/// Rounds q, k and v to bf16 where they are not.
void chunk_gated_delta_rule(const ChunkGatedDeltaRuleArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
