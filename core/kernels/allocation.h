// SPDX-License-Identifier: Apache-2.0
// Memory of pools and weights.
#pragma once

#include <ATen/core/Tensor.h>

namespace xgdn::kernel {

/// Allocates a zeroed pool; on the host in huge pages where the system offers them.
at::Tensor allocate_pool(at::IntArrayRef sizes, const at::TensorOptions& options);

/// Allocates uninitialised memory for weights, likewise.
at::Tensor allocate_weight(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace xgdn::kernel
