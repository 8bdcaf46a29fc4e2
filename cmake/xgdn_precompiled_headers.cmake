# SPDX-License-Identifier: Apache-2.0
# xgdn_precompile(target [first]): the heavy headers of torch are parsed once for all targets that are compiled with the same
# options as `first`, instead of once per file, which would be half of a build. Every file still includes what it uses.
function(xgdn_precompile target)
  if(ARGC GREATER 1)
    target_precompile_headers(${target} REUSE_FROM ${ARGV1})
  else()
    target_precompile_headers(${target} PRIVATE <ATen/TensorOperators.h> <ATen/core/Tensor.h> <ATen/ops/empty.h> <c10/util/StringUtil.h>
                                                <functional> <map> <memory> <optional> <string> <vector>)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE -fpch-preprocess)  # without it ccache does not keep these objects
  endif()
endfunction()
