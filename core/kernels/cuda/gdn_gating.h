// SPDX-License-Identifier: Apache-2.0
// Gates of the delta rule on CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

void gdn_gating(const GdnGatingArgs& args, int64_t T, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
