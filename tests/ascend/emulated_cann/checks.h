// SPDX-License-Identifier: Apache-2.0
// How the ops that the vendor documents with limits say no.
#pragma once

#include <c10/util/StringUtil.h>

#include <initializer_list>
#include <string>

#include "op.h"

namespace emulated_cann {

template <typename... Parts>
void require(bool condition, int status, const Parts&... sentence) {
  if (!condition) throw Refusal{status, c10::str(sentence...)};
}

// What the device cannot check before it runs and the caller must guarantee.
inline void require_value(bool condition, const std::string& sentence) {
  require(condition, kKernelException, "the device would compute garbage: ", sentence);
}

// Whether the documented limits hold.
inline bool strict() {
  return is_on("STRICT", /*otherwise=*/true);
}

inline bool is_ascend950() {
  return setting("SOC").starts_with("Ascend950");
}

inline std::string acl_name(ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "DT_FLOAT";
    case at::kHalf:
      return "DT_FLOAT16";
    case at::kBFloat16:
      return "DT_BFLOAT16";
    case at::kInt:
      return "DT_INT32";
    case at::kLong:
      return "DT_INT64";
    default:
      return c10::toString(type);
  }
}

inline void check_type(const char* name, const OptionalTensor& t, std::initializer_list<ScalarType> allowed) {
  if (!t) return;
  std::string supported;
  for (const ScalarType type : allowed) {
    if (t->scalar_type() == type) return;
    supported += acl_name(type) + ",";
  }
  require(false, kInvalidParameter, "Tensor ", name, " not implemented for ", acl_name(t->scalar_type()),
          ", should be in dtype support list [", supported, "].");
}

inline void check_shape(const char* name, const OptionalTensor& t, at::IntArrayRef expected) {
  if (t) require(t->sizes() == expected, kInvalidParameter, name, ": expected shape ", expected, ", got ", t->sizes());
}

}  // namespace emulated_cann
