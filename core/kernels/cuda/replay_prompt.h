// SPDX-License-Identifier: Apache-2.0
// Prompts on replay states, on CUDA, most of whose tokens go through the chunk kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// T is the number of rows of q, k, v and out; rows of q, k and v are aligned to 16 bytes where they are bf16.
struct ReplayPromptArgs : ReplayGatedDeltaRuleArgs {
  int64_t T = 0;
  int64_t max_len = 0;        // tokens of the longest sequence, or more
  void* workspace = nullptr;  // workspace_bytes(args), 16-byte aligned
};

/// Whether there are kernels for heads of these sizes, and tokens enough for them.
bool replay_prompt_supports(const ReplayPromptArgs& args);

/// Bytes of scratch memory; depends on sizes alone.
size_t workspace_bytes(const ReplayPromptArgs& args);

/// What replay_gated_delta_rule() does with a call that commits its tokens, within the rounding of
/// chunk_gated_delta_rule().
void replay_prompt(const ReplayPromptArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
