# SPDX-License-Identifier: Apache-2.0
# Finds the torch of the given Python interpreter, unless the caller named one (Torch_DIR or CMAKE_PREFIX_PATH).
# Defines xgdn_torch_dir (folder of libtorch_cpu.so) and the target xgdn::openmp: torch's own OpenMP runtime, so that a
# process has one thread pool.
if(XGDN_BUILD_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
else()
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
endif()
if(NOT Torch_DIR AND Python_EXECUTABLE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import torch; print(torch.utils.cmake_prefix_path)"
    OUTPUT_VARIABLE _torch_prefix OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _torch_missing ERROR_QUIET)
  if(_torch_missing EQUAL 0)
    list(APPEND CMAKE_PREFIX_PATH "${_torch_prefix}")
  endif()
endif()
find_package(Torch QUIET)
if(NOT Torch_FOUND)
  message(FATAL_ERROR
    "xgdn needs PyTorch 2.13: 'pip install torch==2.13.0' for the Python at '${Python_EXECUTABLE}', or name a libtorch "
    "with -DTorch_DIR=<libtorch>/share/cmake/Torch.")
endif()
get_filename_component(xgdn_torch_dir "${TORCH_LIBRARY}" DIRECTORY)

find_package(OpenMP REQUIRED COMPONENTS CXX)
file(GLOB _torch_gomp "${xgdn_torch_dir}/libgomp*.so*")
add_library(xgdn_openmp INTERFACE)
target_compile_options(xgdn_openmp INTERFACE $<BUILD_INTERFACE:${OpenMP_CXX_FLAGS}>)
if(_torch_gomp)
  list(GET _torch_gomp 0 _torch_gomp)
  target_link_libraries(xgdn_openmp INTERFACE $<BUILD_INTERFACE:${_torch_gomp}>)
else()
  target_link_libraries(xgdn_openmp INTERFACE $<BUILD_INTERFACE:${OpenMP_CXX_LIBRARIES}>)
endif()
