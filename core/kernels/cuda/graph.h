// SPDX-License-Identifier: Apache-2.0
// CUDA graphs. Their memory is a pool of torch's allocator, so they exist where torch has CUDA.
#pragma once

#include <functional>
#include <memory>

#include "core/kernels/device.h"

namespace xgdn::kernel::cuda {

/// What `launches` starts on the current stream of the current device.
std::unique_ptr<DeviceGraph> record_graph(const std::function<void()>& launches);

}  // namespace xgdn::kernel::cuda
