// SPDX-License-Identifier: Apache-2.0
// Gated RMS norm on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

void rms_norm_gated(const RmsNormGatedArgs& args, int64_t T, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
