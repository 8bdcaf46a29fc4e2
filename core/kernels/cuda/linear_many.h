// SPDX-License-Identifier: Apache-2.0
// Products of 9 to 32 tokens with a weight of very many outputs on CUDA.
#pragma once

#include "core/kernels/cuda/linear.h"

namespace xgdn::kernel::cuda {

/// Whether a call that linear_supports is one for linear_of_many.
bool linear_has_many(const LinearArgs& args);

void linear_of_many(const LinearArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
