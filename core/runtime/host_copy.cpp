// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/host_copy.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace xgdn {

HostCopy::HostCopy(const at::Tensor& tensor)
    : on_host_(at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(!tensor.is_cpu()))) {
  on_host_.copy_(tensor, /*non_blocking=*/true);
  if (tensor.is_cpu()) return;
  const c10::impl::VirtualGuardImpl device(tensor.device().type());
  event_.emplace(tensor.device().type()).record(device.getStream(tensor.device()));
}

const at::Tensor& HostCopy::wait() {
  if (event_) event_->synchronize();
  event_.reset();
  return on_host_;
}

}  // namespace xgdn
