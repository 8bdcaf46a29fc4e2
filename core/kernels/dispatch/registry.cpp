// SPDX-License-Identifier: Apache-2.0
// The one place that knows which backends a build has.
#include "core/kernels/dispatch/registry.h"

#include "core/kernels/cpu/cpu_backend.h"
#include "core/kernels/npu/npu_backend.h"
#include "core/kernels/reference/reference_backend.h"

namespace xgdn::kernel {

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list = {cpu_backend(), npu_backend(), reference_backend()};
  return list;
}

const std::vector<AbsentBackend>& absent_backends() {
  static const std::vector<AbsentBackend> list = {
      {"cuda", "this version of xgdn has no CUDA backend"},
  };
  return list;
}

}  // namespace xgdn::kernel
