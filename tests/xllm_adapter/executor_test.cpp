// SPDX-License-Identifier: Apache-2.0
// What a Gated DeltaNet layer computes between its projections through the executor's functions, against float64: a
// prompt, then a token.
#include "executor.h"

#include "tests/cpp/support/expect_error.h"
#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

namespace executor = xllm::kernel::gdn::executor;

TEST(XllmExecutor, PrefillsAndDecodesALayer) {
  const int64_t H = 2, HV = 4, K = is_npu() ? 128 : 32, V = is_npu() ? 128 : 16, W = 4, D = 2 * H * K + HV * V;
  const std::vector<int64_t> begins{0, 66, 69}, slots{5, 2};
  for (const Types& t : types()) {
    const int64_t T = begins.back(), N = 2;
    const at::Tensor qkv = normal({T + N, D}, t.tokens), weight = normal({D, W}, t.tokens) / 2;
    const at::Tensor a = normal({T + N, HV}, t.tokens), b = normal({T + N, HV}, t.tokens);
    const at::Tensor z = normal({T + N, HV, V}, t.tokens), norm_weight = normal({V}, t.tokens);
    const at::Tensor A_log = at::randn({HV}), dt_bias = at::randn({HV});
    at::Tensor conv_pool = poisoned({7, W - 1, D}, t.tokens), pool = poisoned({7, HV, V, K}, t.states);
    conv_pool[5].copy_(at::randn({W - 1, D}));
    pool[5].copy_(at::randn({HV, V, K}));
    const at::Tensor conv_state = on_device(conv_pool.clone()), state = on_device(pool.clone());
    const at::Tensor indices = on_device(i32({5, 2})), starts = on_device(i32({0, 66, 69}));
    const at::Tensor has_state = on_device(i32({1, 0}).to(at::kBool));
    const auto prompt = [&](const at::Tensor& x) { return on_device(x.narrow(0, 0, T)); };
    const auto token = [&](const at::Tensor& x) { return on_device(x.narrow(0, T, N)); };

    // The prompt: sequence 0 goes on, sequence 1 begins.
    const at::Tensor mixed =
        executor::causal_conv1d_prefill(prompt(qkv), on_device(weight), conv_state, indices, has_state, starts);
    const auto [q, k, v, g, beta] = executor::fused_gdn_prefill_post_conv(mixed, prompt(a), prompt(b), on_device(A_log),
                                                                          on_device(dt_bias), H, K, V);
    at::Tensor initial = at::zeros({N, HV, V, K}, t.states);
    initial[0].copy_(pool[5]);
    const at::Tensor given = on_device(initial.clone());
    const auto [o, last] =
        executor::chunk_gated_delta_rule(q, k, v, g, beta, given, starts, executor::resolve_gdn_prefill_backend());
    EXPECT_TRUE(same_bits(given.cpu(), initial)) << "the given states";
    state.index_copy_(0, indices.to(at::kLong), last);
    const at::Tensor out = executor::rms_norm_gated(o, prompt(z), on_device(norm_weight), 1e-6);
    // The token behind each.
    const at::Tensor step = executor::causal_conv1d_decode(token(qkv), on_device(weight), conv_state, indices);
    const double scale = 1 / std::sqrt(double(K)), step_scale = 0.3;  // a prompt's is not the caller's
    const at::Tensor step_o = executor::fused_recurrent_gated_delta_rule_packed_decode(
        step, token(a), token(b), on_device(A_log), on_device(dt_bias), state, indices, step_scale);
    ASSERT_EQ(step_o.sizes(), at::IntArrayRef({N, 1, HV, V}));
    const at::Tensor step_out = executor::rms_norm_gated(step_o.squeeze(1), token(z), on_device(norm_weight), 1e-6);

    const double bound = 3 * t.bound;  // convolution, keys, outputs and norm are each rounded to the type of the tokens
    const auto [want_g, want_beta] = gates(a, b, A_log, dt_bias);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t length = begins[n + 1] - begins[n];
      const auto whole = [&](const at::Tensor& x) {
        return at::cat({x.narrow(0, begins[n], length), x.narrow(0, T + n, 1)});
      };
      const at::Tensor history = n == 0 ? conv_pool[5] : at::zeros({W - 1, D});
      const at::Tensor rows = convolution(whole(qkv), weight, history);
      const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
        return rows.narrow(1, begin, count * dim).unflatten(1, {count, dim});
      };
      const auto [want_o, S] = token_rule(unit(heads(0, H, K)), unit(heads(H * K, H, K)), heads(2 * H * K, HV, V),
                                          whole(want_g), whole(want_beta), initial[n], scale);
      expect_close(o.narrow(0, begins[n], length), want_o.narrow(0, 0, length), bound, "the prompt's outputs");
      want_o[length].mul_(step_scale / scale);
      expect_close(step_o[n][0], want_o[length], bound, "the token's outputs");
      const at::Tensor want = gated_norm(want_o, whole(z), norm_weight, 1e-6);
      expect_close(out.narrow(0, begins[n], length), want.narrow(0, 0, length), bound, "the prompt");
      expect_close(step_out[n], want[length], bound, "the token");
      expect_close(last[n], S[length], bound, "the prompt's state");
      expect_close(state[slots[n]], S[length + 1], bound, "the token's state");
      EXPECT_TRUE(same_bits(conv_state[slots[n]].cpu(), at::cat({history.to(t.tokens), whole(qkv)}).slice(0, -3)));
    }
    expect_others_untouched(pool, state, slots);
    expect_others_untouched(conv_pool, conv_state, slots);
  }
}

TEST(XllmExecutor, RefusesWidthsThatDoNotFit) {
  const at::Tensor gates = at::zeros({1, 2}), heads = at::zeros({2});
  expect_error<ShapeError>(
      [&] {
        executor::fused_gdn_prefill_post_conv(at::zeros({1, 99}), gates, gates, heads, heads, 1, 16, 16);
      },
      {"fused_gdn_prefill_post_conv", "mixed_qkv", "64", "[1, 99]"});
}

}  // namespace
}  // namespace xgdn::testing
