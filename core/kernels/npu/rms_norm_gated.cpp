// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/rms_norm_gated.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>

#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {

void run_rms_norm_gated(const RmsNormGatedParams& p) {
  at::mul_out(const_cast<at::Tensor&>(p.out), rms_norm(p.x, p.weight, p.eps), at::silu(p.z));
}

}  // namespace xgdn::kernel::npu
