# SPDX-License-Identifier: Apache-2.0
# Options of every target of ours: warnings, torch's flags, the sanitizer.
add_library(xgdn_compile_options INTERFACE)
separate_arguments(_torch_flags NATIVE_COMMAND "${TORCH_CXX_FLAGS}")
# ATen's own headers then include the operators that they use, instead of all of them.
target_compile_definitions(xgdn_compile_options INTERFACE AT_PER_OPERATOR_HEADERS)
target_compile_options(xgdn_compile_options INTERFACE
  -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers -fvisibility-inlines-hidden ${_torch_flags}
  # g++ 12 sees overlapping and endless copies in string concatenation (GCC bug 105651).
  "$<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict;-Wno-stringop-overflow>")
if(XGDN_SANITIZE)
  target_compile_options(xgdn_compile_options INTERFACE -fsanitize=${XGDN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  target_link_options(xgdn_compile_options INTERFACE -fsanitize=${XGDN_SANITIZE})
endif()
