// SPDX-License-Identifier: Apache-2.0
// Kernels for NVIDIA GPUs.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel {

const Backend* cuda_backend();

}  // namespace xgdn::kernel
