// SPDX-License-Identifier: Apache-2.0
// The multi-token prediction head of a checkpoint (mtp.*), but for its decoder layer: what leads into it and out of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/layers/layer_input.h"
#include "core/layers/projection.h"
#include "core/layers/weight_source.h"
#include "core/models/model_config.h"

namespace xgdn {

/// The weight that every checkpoint with an MTP head has.
inline constexpr const char* kMtpProjection = "mtp.fc.weight";
/// Prefix of the names of the head's decoder layer.
inline constexpr const char* kMtpLayer = "mtp.layers.0.";

/// A config with the head's layer behind those of the model: full attention, and experts where the model has any.
ModelConfig with_mtp_layer(ModelConfig config);

/// Proposes the token after the next one. From the hidden state h of a token, behind the model's last norm, and the
/// embedding e of the token that follows it:
///   x = fc [norm_e(e) | norm_h(h)],  a decoder layer over x,  norm,  the model's own head.
/// All norms are zero-centred. The hidden state behind the head's norm takes the place of h for one token more.
class MtpHead {
 public:
  /// Reads the weights named mtp.*. Throws CheckpointError for missing or misshapen ones, UnsupportedError for a head
  /// of several layers or with token embeddings of its own.
  MtpHead(const ModelConfig& config, const WeightSource& weights, const at::TensorOptions& options,
          std::string backend);

  /// x [T, hidden] of embeddings and hidden states [T, hidden] each.
  at::Tensor combine(const at::Tensor& embeddings, const at::Tensor& hidden) const;

  /// The head's hidden states [T, hidden] behind its norm, of the stream that its layer leaves.
  at::Tensor finish(const ResidualStream& stream) const;

  /// The tensors that the head holds.
  std::vector<at::Tensor> weights() const;

 private:
  double eps_;
  std::string backend_;
  Projection fc_;              // [hidden, 2 hidden]
  at::Tensor embedding_norm_;  // [hidden]
  at::Tensor hidden_norm_;     // [hidden]
  at::Tensor norm_;            // [hidden]
};

}  // namespace xgdn
