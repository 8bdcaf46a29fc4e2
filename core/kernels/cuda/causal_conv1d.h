// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution on CUDA: prefill, decode and verification.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// A prefill of T tokens.
void causal_conv1d(const CausalConv1dArgs& args, int64_t T, cudaStream_t stream);

/// Decode and verification: few tokens a sequence.
void causal_conv1d_update(const CausalConv1dArgs& args, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
