// SPDX-License-Identifier: Apache-2.0
// The full-attention layer of the hybrid decoders: q/k norm, partial rotary, paged KV cache, sigmoid output gate.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/layers/attention_batch.h"
#include "core/layers/backend_selection.h"
#include "core/layers/projection.h"
#include "core/layers/rotary.h"
#include "core/layers/shard.h"
#include "core/layers/weight_source.h"

namespace xgdn {

/// Sizes of the whole layer, before sharding.
struct AttentionConfig {
  int64_t hidden_size = 0;
  int64_t num_heads = 0;     // Hq
  int64_t num_kv_heads = 0;  // Hkv, divides Hq
  int64_t head_dim = 0;      // D
  double rms_norm_eps = 1e-6;
  bool bias = false;
};

/// hidden [T, hidden_size] -> [T, hidden_size]. Causal; every sequence attends to its own blocks only.
class GatedAttention {
 public:
  /// Reads `prefix`-named weights (prefix ends with '.'), the rank's heads of them: query heads are split, key and
  /// value heads too, and shared by neighbouring ranks where there are more ranks than heads. Throws CheckpointError
  /// for missing or misshapen weights, ShapeError for sizes that do not divide.
  GatedAttention(const AttentionConfig& config, const WeightSource& weights, const std::string& prefix,
                 const at::TensorOptions& options, const BackendSelection& backends = {}, Shard shard = {});

  /// Writes this step's keys and values into `kv`, then reads each sequence's whole context from it.
  at::Tensor forward(const LayerInput& hidden, const RotaryTable& rotary, const AttentionBatch& batch,
                     KvPool& kv) const;

  /// The tensors that the layer holds.
  std::vector<at::Tensor> weights() const;

 private:
  AttentionConfig config_;  // of this rank
  Shard shard_;
  std::string backend_;
  Projection qkv_;  // rows of a query head: [query | gate]
  Projection o_;
  at::Tensor q_norm_;  // [D]
  at::Tensor k_norm_;  // [D]
};

}  // namespace xgdn
