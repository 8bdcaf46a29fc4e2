// SPDX-License-Identifier: Apache-2.0
// The processor's own kernels, on every instruction set that it has.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel {

const Backend* cpu_backend();

}  // namespace xgdn::kernel
