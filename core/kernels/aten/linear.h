// SPDX-License-Identifier: Apache-2.0
// Products with weights composed from ATen, for any device.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel::aten {

void silu_and_mul(const SiluAndMulParams& p);
void sigmoid_and_mul(const SigmoidAndMulParams& p);
void linear(const LinearParams& p);
/// Makes the weight plain at every call.
void quantized_linear(const QuantizedLinearParams& p);
/// By the backend's own norm, product and gate.
void rms_norm_linear(const Backend& backend, const RmsNormLinearParams& p, const LinearShape& s);
/// What comes after the norm, of a row that is normed.
void linear_of_normed(const Backend& backend, const RmsNormLinearParams& p, const LinearShape& s,
                      const at::Tensor& normed);

}  // namespace xgdn::kernel::aten
