// SPDX-License-Identifier: Apache-2.0
// Which numbers of ranks can share a model, and what of it each of them has.
#pragma once

#include <cstdint>
#include <vector>

#include "core/models/model_config.h"

namespace xgdn {

/// The numbers of ranks, ascending from 1, that divide all that is split: heads, the intermediate sizes of MLP and
/// experts, the vocabulary. Key heads, and key and value heads of attention, may also be shared by several ranks.
std::vector<int64_t> tensor_parallel_sizes(const ModelConfig& config);

/// Throws RequestError that lists tensor_parallel_sizes() and the sizes that `world` does not divide.
void check_tensor_parallel(const ModelConfig& config, int64_t world);

/// The sizes of what one of `world` ranks has.
ModelConfig config_of_rank(const ModelConfig& config, int64_t world);

}  // namespace xgdn
