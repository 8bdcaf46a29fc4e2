// SPDX-License-Identifier: Apache-2.0
// The list of backends and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "core/kernels/backend.h"

namespace xgdn::kernel {

/// Every backend of this build, in order of preference.
const std::vector<const Backend*>& backends();

/// Backends that exist in the project and not in this build, each with its sentence.
struct AbsentBackend {
  std::string name;
  std::string why;
};
const std::vector<AbsentBackend>& absent_backends();

}  // namespace xgdn::kernel
