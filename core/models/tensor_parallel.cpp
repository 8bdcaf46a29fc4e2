// SPDX-License-Identifier: Apache-2.0
#include "core/models/tensor_parallel.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <string>

#include "core/errors.h"
#include "core/layers/shard.h"

namespace xgdn {
namespace {

// A size of the model that ranks split, and the same of one rank.
struct SplitSize {
  const char* name;
  int64_t ModelConfig::*size;
  bool may_be_shared;  // by neighbouring ranks, one piece each
};

constexpr SplitSize kVocabulary{"vocab_size", &ModelConfig::vocab_size, false};

std::vector<SplitSize> split_sizes(const ModelConfig& c) {
  std::vector<SplitSize> sizes{kVocabulary};
  const auto has = [&](LayerType type) { return std::ranges::count(c.layer_types, type) > 0; };
  if (has(LayerType::kLinearAttention)) {
    sizes.push_back({"linear_num_value_heads", &ModelConfig::linear_num_value_heads, false});
    sizes.push_back({"linear_num_key_heads", &ModelConfig::linear_num_key_heads, true});
  }
  if (has(LayerType::kFullAttention)) {
    sizes.push_back({"num_attention_heads", &ModelConfig::num_attention_heads, false});
    sizes.push_back({"num_key_value_heads", &ModelConfig::num_key_value_heads, true});
  }
  if (std::ranges::count(c.is_sparse_layer, false) > 0) {
    sizes.push_back({"intermediate_size", &ModelConfig::intermediate_size, false});
  }
  if (std::ranges::count(c.is_sparse_layer, true) > 0) {
    sizes.push_back({"moe_intermediate_size", &ModelConfig::moe_intermediate_size, false});
    sizes.push_back({"shared_expert_intermediate_size", &ModelConfig::shared_expert_intermediate_size, false});
  }
  return sizes;
}

bool divides(const ModelConfig& config, const SplitSize& split, int64_t world) {
  const int64_t size = config.*split.size;
  return split.may_be_shared ? is_split_or_shared(size, world) : is_split_evenly(size, world);
}

}  // namespace

std::vector<int64_t> tensor_parallel_sizes(const ModelConfig& config) {
  const std::vector<SplitSize> sizes = split_sizes(config);
  int64_t most = config.vocab_size;
  for (const SplitSize& split : sizes) {
    if (!split.may_be_shared) most = std::min(most, config.*split.size);
  }
  std::vector<int64_t> worlds;
  for (int64_t world = 1; world <= most; ++world) {
    if (std::ranges::all_of(sizes, [&](const SplitSize& split) { return divides(config, split, world); })) {
      worlds.push_back(world);
    }
  }
  return worlds;
}

void check_tensor_parallel(const ModelConfig& config, int64_t world) {
  std::vector<std::string> obstacles;
  for (const SplitSize& split : split_sizes(config)) {
    if (!divides(config, split, world)) obstacles.push_back(c10::str(split.name, "=", config.*split.size));
  }
  if (obstacles.empty()) return;
  throw RequestError(c10::str(
      "[Engine] tensor_parallel: expected one of ", c10::Join(", ", tensor_parallel_sizes(config)),
      ", into which the model can be split, got ", world, ", which does not divide ", c10::Join(", ", obstacles)));
}

ModelConfig config_of_rank(const ModelConfig& config, int64_t world) {
  ModelConfig of_rank = config;
  for (const SplitSize& split : split_sizes(config)) {
    of_rank.*split.size = part_of(config.*split.size, /*rank=*/0, world).count;
  }
  return of_rank;
}

}  // namespace xgdn
