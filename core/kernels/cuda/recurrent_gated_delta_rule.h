// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on CUDA, token by token: recurrent_gated_delta_rule, chunk_gated_delta_rule where all is f32,
// and packed_decode, which is the same on one token a sequence with the gates as logits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// Rows of q and k are aligned to 16 bytes.
struct RecurrentGatedDeltaRuleArgs : TokenDeltaRuleArgs {
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  int64_t T = 0;                            // tokens
  int64_t num_slots = 0;                    // of the state's pool
};

/// Whether there is a kernel for heads of these sizes.
bool recurrent_supports(int64_t K);

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
