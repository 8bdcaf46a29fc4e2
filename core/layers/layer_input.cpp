// SPDX-License-Identifier: Apache-2.0
#include "core/layers/layer_input.h"

#include "core/kernels/ops_api.h"
#include "core/layers/rms_norm.h"

namespace xgdn {

at::Tensor LayerInput::hidden(const std::string& backend) const {
  if (!has_norm()) return tokens_;
  const at::Tensor branch = std::exchange(stream_->branch, {});
  return branch.defined() ? add_rms_norm_zero_centred(branch, stream_->residual, *norm_weight_, eps_, backend)
                          : rms_norm_zero_centred(stream_->residual, *norm_weight_, eps_, backend);
}

at::Tensor LayerInput::linear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool use_silu_and_mul,
                              const std::string& backend) const {
  const int64_t width = use_silu_and_mul ? weight.size(0) / 2 : weight.size(0);
  at::Tensor out = kernel::allocate_temporary({tokens_.size(0), width}, tokens_.options());
  kernel::RmsNormLinearParams p{.x = stream_->residual,
                                .norm_weight = *norm_weight_,
                                .weight = weight,
                                .out = out,
                                .bias = bias,
                                .use_silu_and_mul = use_silu_and_mul,
                                .eps = eps_,
                                .backend = backend};
  if (stream_->branch.defined()) {
    p.residual = std::exchange(p.x, std::exchange(stream_->branch, {}));
    p.residual_out = stream_->residual = kernel::allocate_temporary(tokens_.sizes(), tokens_.options());
  }
  kernel::rms_norm_linear(p);
  return out;
}

}  // namespace xgdn
