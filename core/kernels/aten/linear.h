// SPDX-License-Identifier: Apache-2.0
// Products with weights composed from ATen, for any device.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void silu_and_mul(const SiluAndMulParams& p);
void sigmoid_and_mul(const SigmoidAndMulParams& p);
void linear(const LinearParams& p);
/// Makes the weight plain at every call.
void quantized_linear(const QuantizedLinearParams& p);

}  // namespace xgdn::kernel::aten
