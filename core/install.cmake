# SPDX-License-Identifier: Apache-2.0
# What an installation holds, component "devel": libxgdn, the public headers under include/xgdn with the paths that they
# include each other by (core/...), and the CMake package. A wheel has the same tree inside the package folder.
include(CMakePackageConfigHelpers)

set(XGDN_TORCH_RPATH "${xgdn_torch_dir}" CACHE STRING "Where the installed libxgdn looks for torch's libraries")
set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/xgdn")

target_include_directories(xgdn PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/xgdn>)
set_target_properties(xgdn PROPERTIES INSTALL_RPATH "$ORIGIN;${XGDN_TORCH_RPATH}")
install(TARGETS xgdn EXPORT xgdnTargets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT devel)

# Of core/kernels only ops_api.h and what it includes is public; headers named *json* show a private dependency.
install(FILES errors.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/xgdn/core" COMPONENT devel)
install(FILES kernels/ops_api.h kernels/allocation.h kernels/backend_choice.h kernels/chunk_metadata.h
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/xgdn/core/kernels" COMPONENT devel)
foreach(_level kernels/ops layers models runtime)
  file(GLOB _headers CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/${_level}/*.h")
  list(FILTER _headers EXCLUDE REGEX "json[^/]*$")
  install(FILES ${_headers} DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/xgdn/core/${_level}" COMPONENT devel)
endforeach()

install(EXPORT xgdnTargets NAMESPACE xgdn:: DESTINATION "${_package_dir}" COMPONENT devel)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" xgdn_torch_minor "${Torch_VERSION}")
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/xgdnConfig.cmake.in" xgdnConfig.cmake
  INSTALL_DESTINATION "${_package_dir}" NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(xgdnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/xgdnConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/xgdnConfigVersion.cmake"
        DESTINATION "${_package_dir}" COMPONENT devel)

# A wheel brings Highway along where it is a shared library; a system installation uses the system's.
if(XGDN_BUILD_PYTHON AND xgdn_highway_type STREQUAL "SHARED_LIBRARY")
  install(FILES $<TARGET_FILE:hwy::hwy> DESTINATION "${CMAKE_INSTALL_LIBDIR}"
          RENAME $<TARGET_SONAME_FILE_NAME:hwy::hwy> COMPONENT python)
endif()
