// SPDX-License-Identifier: Apache-2.0
// The maths of the delta rules in double, to compare others with.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel {

const Backend* reference_backend();

}  // namespace xgdn::kernel
