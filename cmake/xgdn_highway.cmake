# SPDX-License-Identifier: Apache-2.0
# Google Highway: the system's package, else a pinned version from its repository.
find_package(hwy 1.0.3 CONFIG QUIET)
if(NOT TARGET hwy::hwy)
  if(FETCHCONTENT_FULLY_DISCONNECTED)
    message(FATAL_ERROR "xgdn needs Google Highway: install libhwy-dev (Debian, Ubuntu), or allow downloads "
                        "(-DFETCHCONTENT_FULLY_DISCONNECTED=OFF), or set -DFETCHCONTENT_SOURCE_DIR_HIGHWAY=<checkout>.")
  endif()
  include(FetchContent)
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_INSTALL OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(highway URL https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz)
  FetchContent_MakeAvailable(highway)
  add_library(hwy::hwy ALIAS hwy)
endif()

# What the kernels use. A shared Highway is linked by its file: CMake would write the target's name into the exported
# package, whose users need not have Highway.
add_library(xgdn_highway INTERFACE)
get_target_property(xgdn_highway_type hwy::hwy TYPE)
if(xgdn_highway_type STREQUAL "SHARED_LIBRARY")
  target_include_directories(xgdn_highway SYSTEM INTERFACE $<TARGET_PROPERTY:hwy::hwy,INTERFACE_INCLUDE_DIRECTORIES>)
  target_compile_definitions(xgdn_highway INTERFACE $<TARGET_PROPERTY:hwy::hwy,INTERFACE_COMPILE_DEFINITIONS>)
  target_link_libraries(xgdn_highway INTERFACE $<TARGET_FILE:hwy::hwy>)
else()
  target_link_libraries(xgdn_highway INTERFACE hwy::hwy)
endif()
# Every kernel is compiled once per instruction set. Processors that have SSSE3 without SSE4.1 (Core 2, the first Atoms)
# run plain code.
target_compile_definitions(xgdn_highway INTERFACE HWY_DISABLED_TARGETS=HWY_SSSE3)
