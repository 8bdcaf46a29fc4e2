// SPDX-License-Identifier: Apache-2.0
// Uses an installed xgdn from C++, without Python.
//   consumer                     two tokens of one head through the gated delta rule
//   consumer MODEL TOKEN...      continues a prompt of token ids with the model in a Hugging Face directory
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/kernels/ops_api.h"
#include "core/runtime/engine.h"

namespace {

// Both tokens carry the same unit key and the query equals it, so that the formulas can be followed by hand:
//   token 0: S = 0, u = v, S = v k^T, o = v
//   token 1: alpha = 1/2, u = v - v/2, S = v/2 k^T + v/2 k^T = v k^T, o = v
int run_op() {
  constexpr int kTokens = 2, kHeadDim = 16;
  const at::Tensor key = at::full({kTokens, 1, kHeadDim}, 0.25);  // length 1: 16 x (1/4)^2
  const at::Tensor out = at::full({kTokens, 1, kHeadDim}, std::nan(""));
  xgdn::kernel::recurrent_gated_delta_rule({.q = key,
                                            .k = key,
                                            .v = at::full({kTokens, 1, kHeadDim}, 3.0),
                                            .g = at::full({kTokens, 1}, std::log(0.5)),
                                            .beta = at::full({kTokens, 1}, 1.0),
                                            .state = at::zeros({1, 1, kHeadDim, kHeadDim}),
                                            .cu_seqlens = at::tensor({0, kTokens}, at::kInt),
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

int generate(const std::filesystem::path& model, std::vector<int32_t> prompt) {
  const std::unique_ptr<xgdn::Engine> engine = xgdn::Engine::load(model);
  const xgdn::GenerationResult result =
      engine->generate({{.prompt = std::move(prompt), .max_new_tokens = 16, .ignore_eos = true}}).front();
  if (!result.error.empty()) {
    std::fprintf(stderr, "consumer: %s\n", result.error.c_str());
    return 1;
  }
  for (const int32_t token : result.tokens) std::printf("%d ", token);
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 1) return run_op();
    std::vector<int32_t> prompt;
    for (int i = 2; i < argc; ++i) prompt.push_back(std::stoi(argv[i]));
    return generate(argv[1], std::move(prompt));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "consumer: %s\n", e.what());
    return 1;
  }
}
