// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/device.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>

#include <atomic>
#include <exception>

namespace xgdn::kernel {

// Some devices report an error once and then drop what they are given, so that whatever lay in memory is the result.
bool is_alive(c10::Device device) {
  if (device.is_cpu()) return true;
  static std::atomic<int32_t> num_asked = 0;
  try {
    const int32_t number = ++num_asked;  // not what an earlier question left in memory
    const at::Tensor twice = at::full({1}, number, at::kFloat).to(device).mul(2);
    return twice.to(at::kCPU).item<float>() == 2 * static_cast<float>(number);
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace xgdn::kernel
