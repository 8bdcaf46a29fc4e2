// SPDX-License-Identifier: Apache-2.0
// The gated delta rule layer of Qwen3-Next and Qwen3.5.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/layers/backend_selection.h"
#include "core/layers/gdn_batch.h"
#include "core/layers/gdn_state.h"
#include "core/layers/projection.h"
#include "core/layers/shard.h"
#include "core/layers/weight_source.h"

namespace xgdn {

/// Tokens of a replay state's ring: of 16, 32 and 64 the number that reads and computes least.
inline constexpr int64_t kReplayChunk = 16;

/// Sizes of the whole layer, before sharding.
struct GdnConfig {
  int64_t hidden_size = 0;
  int64_t num_k_heads = 0;      // H
  int64_t num_v_heads = 0;      // HV
  int64_t head_k_dim = 0;       // K
  int64_t head_v_dim = 0;       // V
  int64_t conv_kernel_dim = 4;  // W
  double rms_norm_eps = 1e-6;
  at::ScalarType state_dtype = at::kFloat;  // of the delta pool; the conv pool has the weights' dtype
  int64_t max_draft_tokens = 0;             // further rows of the conv pool, and of rings
  bool has_replay_states = false;           // checkpoints and rings: the same bits by prefill and decode
};

/// hidden [T, hidden_size] -> [T, hidden_size]. The two checkpoint layouts (Qwen3-Next: in_proj_qkvz and in_proj_ba,
/// interleaved by key head; Qwen3.5: in_proj_qkv, in_proj_z, in_proj_b, in_proj_a) become one projection
/// [q | k | v | z | b | a] when the layer is built; forward knows neither.
class Qwen3GatedDeltaNet {
 public:
  /// Reads `prefix`-named weights (prefix ends with '.'), slices the rank's heads, converts and moves them to
  /// `options`. Throws CheckpointError for missing or misshapen weights, ShapeError for sizes that do not divide.
  Qwen3GatedDeltaNet(const GdnConfig& config, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options, Shard shard = {}, BackendSelection backends = {});

  /// Computes the step and updates `state` in place. Throws ShapeError when the segments do not cover the tokens.
  at::Tensor forward(const LayerInput& hidden, const GdnBatch& batch, GdnState& state) const;

  /// The pools that this rank needs.
  std::vector<StateSpec> state_specs() const;

  /// The tensors that the layer holds.
  std::vector<at::Tensor> weights() const;

  /// Sizes of this rank.
  const GdnConfig& local_config() const { return local_; }

 private:
  struct Projected;
  Projected split(const at::Tensor& projected) const;
  void attend(const Segment& segment, const at::Tensor& projected, GdnState& state, const at::Tensor& o) const;
  void decode(const Segment& segment, const at::Tensor& projected, GdnState& state, const at::Tensor& o) const;
  at::Tensor convolve(const Segment& segment, const at::Tensor& x, GdnState& state) const;
  void delta_rule(const Segment& segment, const at::Tensor& mixed_qkv, const at::Tensor& a, const at::Tensor& b,
                  GdnState& state, const at::Tensor& o) const;

  GdnConfig local_;
  Shard shard_;
  BackendSelection backends_;
  Projection in_proj_;      // [2HK + 2HVV + 2HV, hidden]  rows q, k, v, z, b, a
  at::Tensor conv_weight_;  // [2HK + HVV, W]
  std::optional<at::Tensor> conv_bias_;
  at::Tensor A_log_;     // [HV]  f32
  at::Tensor dt_bias_;   // [HV]  f32
  at::Tensor norm_;      // [V]
  Projection out_proj_;  // [hidden, HVV]
};

}  // namespace xgdn
