// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on replay states, on CUDA: decode, verification and prompts of any length by one kernel, and
// the plain states after any token of a ring.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// A call, or the part of each sequence's tokens that `ends` leaves of it.
struct ReplayPartArgs : ReplayGatedDeltaRuleArgs {
  const int32_t* ends = nullptr;  // [N]  where sequences end that begin at cu_seqlens
};

/// T: tokens of all sequences. For K as recurrent_supports has them; rows of q and k, and slots of the checkpoints and
/// of the ring's keys, are aligned to 16 bytes.
void replay_gated_delta_rule(const ReplayPartArgs& args, int64_t T, cudaStream_t stream);

/// Writes the plain states after the first lengths[n] <= C tokens of the rings.
void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
