// SPDX-License-Identifier: Apache-2.0
// A layer's decode step between its two projections on CUDA, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// Whether there is a kernel for these sizes, and for a history of the inputs' type.
bool decode_step_supports(const DecodeStepArgs& args);

/// The pools have so many slots.
void gdn_decode_step(const DecodeStepArgs& args, int64_t num_slots, int64_t num_conv_slots, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
