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
