// SPDX-License-Identifier: Apache-2.0
// Which backends the ops of a model run on.
#pragma once

#include <string>

namespace xgdn {

/// Backend names for the two phases; "auto" follows kernel::default_backend(). An op runs on the backend of its own
/// phase (kernel::Phase) in every layer: chunk_gated_delta_rule and causal_conv1d belong to prefill, all other ops to
/// decode, because one call of theirs serves all tokens of a step.
struct BackendSelection {
  std::string prefill = "auto";
  std::string decode = "auto";
  std::string prefill_accuracy = "auto";  // of chunk_gated_delta_rule, of replay_gated_delta_rule for prompts
};

}  // namespace xgdn
