// SPDX-License-Identifier: Apache-2.0
// Ascend, through the ops of torch_npu where the process has loaded it.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel {

const Backend* npu_backend();

}  // namespace xgdn::kernel
