# SPDX-License-Identifier: Apache-2.0
# nlohmann-json: the system's package, else a pinned version from its repository.
find_package(nlohmann_json 3.11 CONFIG QUIET)
if(NOT TARGET nlohmann_json::nlohmann_json)
  if(FETCHCONTENT_FULLY_DISCONNECTED)
    message(FATAL_ERROR "xgdn needs nlohmann-json: install nlohmann-json3-dev (Debian, Ubuntu), or allow downloads "
                        "(-DFETCHCONTENT_FULLY_DISCONNECTED=OFF), or set -DFETCHCONTENT_SOURCE_DIR_JSON=<checkout>.")
  endif()
  include(FetchContent)
  FetchContent_Declare(json URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz)
  FetchContent_MakeAvailable(json)
endif()
