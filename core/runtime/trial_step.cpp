// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/trial_step.h"

#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <set>
#include <utility>

#include "core/errors.h"
#include "core/runtime/sequence_logits.h"

namespace xgdn {
namespace {

// What backends take at any size that models have is cut to these.
constexpr int64_t kWidth = 64;
constexpr int64_t kVocab = 2;

class Zeros : public WeightSource {
 public:
  bool contains(const std::string& /*name*/) const override { return false; }
  at::Tensor get(const std::string& /*name*/, at::IntArrayRef shape) const override { return at::zeros(shape); }
  bool is_same(const std::string& /*name*/, const std::string& /*other*/) const override { return false; }
};

// One layer of each kind.
ModelConfig small_config(const ModelConfig& config) {
  ModelConfig c = config;
  c.vocab_size = std::min(c.vocab_size, kVocab);
  c.hidden_size = std::min(c.hidden_size, kWidth);
  c.intermediate_size = std::min(c.intermediate_size, kWidth);
  c.moe_intermediate_size = std::min(c.moe_intermediate_size, kWidth);
  c.shared_expert_intermediate_size = std::min(c.shared_expert_intermediate_size, kWidth);
  c.tie_word_embeddings = false;
  c.layer_types.clear();
  c.is_sparse_layer.clear();
  std::set<std::pair<LayerType, bool>> kinds;
  for (size_t i = 0; i < config.layer_types.size(); ++i) {
    if (!kinds.emplace(config.layer_types[i], config.is_sparse_layer[i]).second) continue;
    c.layer_types.push_back(config.layer_types[i]);
    c.is_sparse_layer.push_back(config.is_sparse_layer[i]);
  }
  c.num_hidden_layers = static_cast<int64_t>(c.layer_types.size());
  return c;
}

UnsupportedError unsupported(const ModelConfig& c, const Error& error) {
  return UnsupportedError(c10::str(
      "[Engine] config: expected sizes that a backend can run, got linear_conv_kernel_dim=", c.linear_conv_kernel_dim,
      ", linear_key_head_dim=", c.linear_key_head_dim, ", linear_value_head_dim=", c.linear_value_head_dim,
      ", linear_num_key_heads=", c.linear_num_key_heads, ", linear_num_value_heads=", c.linear_num_value_heads,
      ", head_dim=", c.head_dim, ": ", error.what()));
}

}  // namespace

void try_step(const ModelConfig& config, const DecoderOptions& options) {
  const c10::InferenceMode inference;
  DecoderOptions quiet = options;
  quiet.on_layer_loaded = nullptr;
  try {
    sequence_logits(HybridDecoder(small_config(config), Zeros(), quiet), {0, 0}, {0});
  } catch (const ShapeError& error) {
    throw unsupported(config, error);
  } catch (const DtypeError& error) {
    throw unsupported(config, error);
  } catch (const UnsupportedError& error) {
    throw unsupported(config, error);
  }
}

}  // namespace xgdn
