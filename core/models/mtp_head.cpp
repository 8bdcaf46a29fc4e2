// SPDX-License-Identifier: Apache-2.0
#include "core/models/mtp_head.h"

#include <ATen/ops/cat.h>
#include <c10/util/StringUtil.h>

#include <utility>

#include "core/errors.h"
#include "core/layers/rms_norm.h"

namespace xgdn {
namespace {

const ModelConfig& checked(const ModelConfig& config) {
  if (config.num_mtp_layers != 1) {
    throw UnsupportedError(c10::str("[MtpHead] mtp_num_hidden_layers: expected 1, got ", config.num_mtp_layers));
  }
  if (config.has_mtp_embeddings) {
    throw UnsupportedError(
        "[MtpHead] mtp_use_dedicated_embeddings: expected false, the model's own token embedding, got true");
  }
  return config;
}

}  // namespace

ModelConfig with_mtp_layer(ModelConfig config) {
  config.layer_types.push_back(LayerType::kFullAttention);
  config.is_sparse_layer.push_back(config.num_experts > 0);
  ++config.num_hidden_layers;
  return config;
}

MtpHead::MtpHead(const ModelConfig& config, const WeightSource& weights, const at::TensorOptions& options,
                 std::string backend)
    : eps_(checked(config).rms_norm_eps),
      backend_(std::move(backend)),
      fc_(weights, kMtpProjection, {config.hidden_size, 2 * config.hidden_size}, options),
      embedding_norm_(load_weight(weights, "mtp.pre_fc_norm_embedding.weight", {config.hidden_size}, options)),
      hidden_norm_(load_weight(weights, "mtp.pre_fc_norm_hidden.weight", {config.hidden_size}, options)),
      norm_(load_weight(weights, "mtp.norm.weight", {config.hidden_size}, options)) {}

at::Tensor MtpHead::combine(const at::Tensor& embeddings, const at::Tensor& hidden) const {
  const at::Tensor both = at::cat({rms_norm_zero_centred(embeddings, embedding_norm_, eps_, backend_),
                                   rms_norm_zero_centred(hidden, hidden_norm_, eps_, backend_)},
                                  /*dim=*/1);
  return fc_.forward(both, backend_);
}

at::Tensor MtpHead::finish(const ResidualStream& stream) const {
  return add_rms_norm_zero_centred(stream.branch, stream.residual, norm_, eps_, backend_);
}

std::vector<at::Tensor> MtpHead::weights() const {
  std::vector<at::Tensor> weights{embedding_norm_, hidden_norm_, norm_};
  fc_.append_weights(weights);
  return weights;
}

}  // namespace xgdn
