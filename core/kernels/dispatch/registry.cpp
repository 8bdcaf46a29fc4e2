// SPDX-License-Identifier: Apache-2.0
// The one place that knows which backends a build has.
#include "core/kernels/dispatch/registry.h"

#include "core/kernels/cpu/cpu_backend.h"
#ifdef XGDN_HAS_CUDA
#include "core/kernels/cuda/cuda_backend.h"
#endif
#include "core/kernels/npu/npu_backend.h"
#include "core/kernels/reference/reference_backend.h"

namespace xgdn::kernel {

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list = {cpu_backend(),
#ifdef XGDN_HAS_CUDA
                                                   cuda_backend(),
#endif
                                                   npu_backend(), reference_backend()};
  return list;
}

const std::vector<AbsentBackend>& absent_backends() {
  static const std::vector<AbsentBackend> list = {
#ifndef XGDN_HAS_CUDA
      {"cuda", "this build of xgdn has no CUDA backend: its torch has no CUDA, or there was no nvcc"},
#endif
  };
  return list;
}

}  // namespace xgdn::kernel
