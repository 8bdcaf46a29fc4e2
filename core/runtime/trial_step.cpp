// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/trial_step.h"

#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <set>
#include <utility>

#include "core/errors.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/runner.h"

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

void run_steps(const ModelConfig& config, const DecoderOptions& options) {
  const HybridDecoder decoder(config, Zeros(), options);
  StatePool states(decoder.state_specs(), /*num_slots=*/1, decoder.device());
  const KvCacheSpec spec = Runner::kv_spec(decoder, {});
  KvCache kv(spec, /*num_blocks=*/1, decoder.device());
  const BatchBuilder builder({.num_slots = 1,
                              .num_kv_blocks = 1,
                              .kv_block_size = spec.block_size,
                              .vocab_size = config.vocab_size,
                              .num_v_heads = config.linear_num_value_heads},
                             decoder.device());
  ModelState state{states.layers(), kv.layers()};
  SequenceStep step{.kind = SegmentKind::kPrefill,
                    .tokens = {0, 0},
                    .state_slots = {0},
                    .write_slot = 0,
                    .conv_slot = 0,
                    .has_initial_state = false,
                    .kv_blocks = {0}};
  decoder.forward(builder.build({step}).input, state);
  step.kind = SegmentKind::kDecode;
  step.num_cached = std::ssize(step.tokens);
  step.tokens = {0};
  step.has_initial_state = true;
  decoder.forward(builder.build({step}).input, state);
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
    run_steps(small_config(config), quiet);
  } catch (const ShapeError& error) {
    throw unsupported(config, error);
  } catch (const DtypeError& error) {
    throw unsupported(config, error);
  } catch (const UnsupportedError& error) {
    throw unsupported(config, error);
  }
}

}  // namespace xgdn
