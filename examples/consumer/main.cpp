// SPDX-License-Identifier: Apache-2.0
// Uses an installed xgdn from C++, without Python: two tokens of one head through the gated delta rule.
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

#include "core/kernels/ops_api.h"

namespace {

// Both tokens carry the same unit key and the query equals it, so that the formulas can be followed by hand:
//   token 0: S = 0, u = v, S = v k^T, o = v
//   token 1: alpha = 1/2, u = v - v/2, S = v/2 k^T + v/2 k^T = v k^T, o = v
int run() {
  constexpr int64_t kTokens = 2, kHeadDim = 16;
  const at::Tensor key = at::full({kTokens, 1, kHeadDim}, 0.25);  // length 1: 16 x (1/4)^2
  const at::Tensor out = at::full({kTokens, 1, kHeadDim}, std::nan(""));
  at::Tensor state = at::zeros({1, 1, kHeadDim, kHeadDim});
  xgdn::kernel::recurrent_gated_delta_rule({.q = key,
                                            .k = key,
                                            .v = at::full({kTokens, 1, kHeadDim}, 3.0),
                                            .g = at::full({kTokens, 1}, std::log(0.5)),
                                            .beta = at::full({kTokens, 1}, 1.0),
                                            .state = state,
                                            .cu_seqlens = at::tensor({0, int{kTokens}}, at::kInt),
                                            .state_indices = at::tensor({0}, at::kInt),
                                            .out = out,
                                            .scale = 1.0,
                                            .use_qk_l2norm_in_kernel = false});
  std::printf("backend: %s\n", xgdn::kernel::last_backend("recurrent_gated_delta_rule").c_str());
  for (int64_t i = 0; i < out.numel(); ++i) {
    const float o = out.const_data_ptr<float>()[i];
    if (!(std::fabs(o - 3.0F) < 1e-5F)) {
      std::fprintf(stderr, "consumer: out[%d] is %g instead of 3\n", static_cast<int>(i), o);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "consumer: %s\n", e.what());
    return 1;
  }
}
