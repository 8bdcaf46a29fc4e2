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

# The public headers: what a program may include, and what those include.
set(xgdn_public_headers
  errors.h
  kernels/allocation.h
  kernels/backend_choice.h
  kernels/chunk_metadata.h
  kernels/device.h
  kernels/op_profile.h
  kernels/ops/attention.h
  kernels/ops/causal_conv1d.h
  kernels/ops/contract.h
  kernels/ops/delta_rule.h
  kernels/ops/linear.h
  kernels/ops/logits.h
  kernels/ops/moe.h
  kernels/ops/norm.h
  kernels/ops/quantized_weight.h
  kernels/ops/replay.h
  kernels/ops/state.h
  kernels/ops_api.h
  kernels/step_memory.h
  layers/attention_batch.h
  layers/backend_selection.h
  layers/gated_attention.h
  layers/gdn_batch.h
  layers/gdn_state.h
  layers/layer_input.h
  layers/mlp.h
  layers/projection.h
  layers/qwen3_gated_delta_net.h
  layers/rms_norm.h
  layers/rotary.h
  layers/shard.h
  layers/weight_source.h
  models/hybrid_decoder.h
  models/model_config.h
  models/mtp_head.h
  models/tensor_parallel.h
  checkpoint/checkpoint.h
  checkpoint/load_report.h
  checkpoint/model_directory.h
  checkpoint/quantization_config.h
  checkpoint/safetensors.h
  checkpoint/stored_weight.h
  runtime/batch_builder.h
  runtime/engine.h
  runtime/engine_loop.h
  runtime/follower.h
  runtime/grammar.h
  runtime/grammar_masks.h
  runtime/host_copy.h
  runtime/kv_cache.h
  runtime/leader.h
  runtime/load_decoder.h
  runtime/logit_row.h
  runtime/logit_rules.h
  runtime/logprobs.h
  runtime/model_runner.h
  runtime/mtp_drafter.h
  runtime/plan.h
  runtime/pool_contents.h
  runtime/prefix_cache.h
  runtime/process_group.h
  runtime/rank_command.h
  runtime/request.h
  runtime/runner_options.h
  runtime/sampler.h
  runtime/sampling_params.h
  runtime/scheduler.h
  runtime/sequence.h
  runtime/sequence_memory.h
  runtime/session.h
  runtime/session_file.h
  runtime/sharded_memory.h
  runtime/state_pool.h
  runtime/step_buffers.h
  runtime/stopwatch.h
  runtime/turn_mutex.h
  runtime/wanted_logits.h
)
foreach(_header IN LISTS xgdn_public_headers)
  get_filename_component(_folder "${_header}" DIRECTORY)
  install(FILES "${_header}" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/xgdn/core/${_folder}" COMPONENT devel)
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
