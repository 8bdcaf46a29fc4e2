// SPDX-License-Identifier: Apache-2.0
// Whether a device still works.
#pragma once

#include <c10/core/Device.h>

namespace xgdn::kernel {

/// Whether the device still computes. Waits for what it has been given.
bool is_alive(c10::Device device);

}  // namespace xgdn::kernel
