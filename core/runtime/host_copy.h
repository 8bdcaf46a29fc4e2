// SPDX-License-Identifier: Apache-2.0
// A tensor on its way to the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <optional>

namespace xgdn {

/// Copies a device's tensor to the host while the device goes on with what it is given next.
class HostCopy {
 public:
  HostCopy() = default;  // of nothing
  /// Starts behind what the device has been given so far.
  explicit HostCopy(const at::Tensor& tensor);

  /// Returns the copy once it is there. Throws what the device reports.
  const at::Tensor& wait();

 private:
  at::Tensor on_host_;
  std::optional<c10::Event> event_;
};

}  // namespace xgdn
