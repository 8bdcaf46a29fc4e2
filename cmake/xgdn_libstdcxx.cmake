# SPDX-License-Identifier: Apache-2.0
# libxgdn shares std::ostream and exceptions with torch, so both must use one libstdc++. A toolchain that has its archive
# alone links a second one into libxgdn, which crashes in the first stream.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libstdc++.so OUTPUT_VARIABLE _shared OUTPUT_STRIP_TRAILING_WHITESPACE)
  execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -print-file-name=libstdc++.a OUTPUT_VARIABLE _archive OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT IS_ABSOLUTE "${_shared}" AND IS_ABSOLUTE "${_archive}")
    message(FATAL_ERROR
      "This toolchain would link libstdc++ statically into libxgdn, which then crashes beside torch: ${CMAKE_CXX_COMPILER} "
      "finds ${_archive} but no libstdc++.so. Put a link of that name to libstdc++.so.6 into a folder and name the folder "
      "in LIBRARY_PATH.")
  endif()
endif()
