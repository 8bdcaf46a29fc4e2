// SPDX-License-Identifier: Apache-2.0
// What the host does around a kernel of CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace xgdn::kernel::cuda {

/// Throws where the launch before it was refused. Errors of the kernel itself come later, where somebody waits for it.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("[") + op + "] launch: " + cudaGetErrorString(error));
}

inline constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace xgdn::kernel::cuda
