# SPDX-License-Identifier: Apache-2.0
# The kernels for NVIDIA GPUs. XGDN_CUDA: ON, OFF, or AUTO: where torch has CUDA. They see no torch, so they compile
# beside a torch of the CPU too; their backend then says that it cannot serve.
set(XGDN_CUDA AUTO CACHE STRING "Build the CUDA backend: ON, OFF or AUTO (where torch has CUDA)")
set_property(CACHE XGDN_CUDA PROPERTY STRINGS AUTO ON OFF)
set(XGDN_CUDA_ARCHITECTURES "80-real;90a-real" CACHE STRING "GPU architectures, as CMAKE_CUDA_ARCHITECTURES has them")

set(XGDN_HAS_CUDA OFF)
if(XGDN_CUDA STREQUAL "ON" OR (XGDN_CUDA STREQUAL "AUTO" AND EXISTS "${xgdn_torch_dir}/libc10_cuda.so"))
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES "${XGDN_CUDA_ARCHITECTURES}")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 knows no later one of nvcc's
    find_package(CUDAToolkit REQUIRED)
    set(XGDN_HAS_CUDA ON)
  elseif(XGDN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "XGDN_CUDA=ON needs nvcc 12.4 or later: install the CUDA toolkit, or name it with CUDACXX.")
  else()
    message(STATUS "xgdn: torch has CUDA but there is no nvcc: the cuda backend is left out")
  endif()
endif()
