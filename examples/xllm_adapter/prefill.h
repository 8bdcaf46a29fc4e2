// SPDX-License-Identifier: Apache-2.0
// A prefill over states that are the call's own.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "sequences.h"

namespace xllm::kernel::gdn {

struct PrefillInputs {
  at::Tensor q;                      // [T, H, K]
  at::Tensor k;                      // [T, H, K]
  at::Tensor v;                      // [T, HV, V]
  at::Tensor g;                      // [T, HV]
  at::Tensor beta;                   // [T, HV]
  std::optional<double> scale = {};  // K^-0.5
  bool use_qk_l2norm = false;
  std::string backend = "auto";
};

/// states [N, HV, V, K], the initial ones, replaced by the final ones. Returns [T, HV, V].
at::Tensor prefill(const PrefillInputs& in, const at::Tensor& states, const Sequences& sequences);

}  // namespace xllm::kernel::gdn
