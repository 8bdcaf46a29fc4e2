// SPDX-License-Identifier: Apache-2.0
// What a layer computes on: hidden states, or the residual stream and the norm that leads from it into the layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

namespace xgdn {

/// The residual stream of a step, and what the layer before adds to it. The next norm adds the two.
struct ResidualStream {
  at::Tensor residual;  // [T, hidden]
  at::Tensor branch;    // [T, hidden]  undefined: nothing is to be added
};

/// Asked once, by hidden() or by linear(): where it is a norm of the stream, that is when the branch is added.
class LayerInput {
 public:
  /// Hidden states [T, hidden] that exist. Implicit, so that a layer can be called with them.
  LayerInput(at::Tensor hidden) : tokens_(std::move(hidden)) {}
  /// (1 + norm_weight) * (s / rms(s)) of the stream's sum s; both outlive the input.
  LayerInput(ResidualStream& stream, const at::Tensor& norm_weight, double eps)
      : tokens_(stream.residual), stream_(&stream), norm_weight_(&norm_weight), eps_(eps) {}

  /// A tensor of the hidden states' sizes, dtype and device.
  const at::Tensor& tokens() const { return tokens_; }

  /// Whether there is a norm to compute.
  bool has_norm() const { return stream_ != nullptr; }

  /// The hidden states [T, hidden].
  at::Tensor hidden(const std::string& backend) const;

  /// kernel::rms_norm_linear of an input that has a norm.
  at::Tensor linear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool use_silu_and_mul,
                    const std::string& backend) const;

 private:
  at::Tensor tokens_;
  ResidualStream* stream_ = nullptr;
  const at::Tensor* norm_weight_ = nullptr;
  double eps_ = 0;
};

}  // namespace xgdn
