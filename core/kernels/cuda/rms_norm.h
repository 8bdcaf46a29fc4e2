// SPDX-License-Identifier: Apache-2.0
// RMS norm with the residual sum before it and the rotary positions after it, on CUDA over pointers, strides and sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

/// A thread keeps its part of a row in registers, which bounds D.
inline constexpr int64_t kMaxNormedDim = 8192;

void rms_norm(const RmsNormArgs& args, int64_t num_tokens, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
