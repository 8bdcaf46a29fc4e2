// SPDX-License-Identifier: Apache-2.0
// The gates of an MLP and of attention on CUDA over pointers, strides and sizes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

void silu_and_mul(const SiluAndMulArgs& args, int64_t num_tokens, cudaStream_t stream);

void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t num_tokens, cudaStream_t stream);

}  // namespace xgdn::kernel::cuda
