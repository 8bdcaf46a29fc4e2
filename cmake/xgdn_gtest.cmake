# SPDX-License-Identifier: Apache-2.0
# GoogleTest: the system's package, else a pinned version from its repository.
find_package(GTest QUIET)
if(NOT TARGET GTest::gtest)
  if(FETCHCONTENT_FULLY_DISCONNECTED)
    message(FATAL_ERROR "The C++ tests need GoogleTest: install libgtest-dev (Debian, Ubuntu), or configure with "
                        "-DXGDN_BUILD_TESTS=OFF, or set -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=<checkout>.")
  endif()
  include(FetchContent)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googletest URL https://github.com/google/googletest/archive/refs/tags/v1.17.0.tar.gz)
  FetchContent_MakeAvailable(googletest)
endif()
include(GoogleTest)
