// SPDX-License-Identifier: Apache-2.0
// The adapter's delta rules, gates and norms against float64 as xLLM's C++ layer calls them.
#include <cmath>
#include <functional>

#include "ops_api.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

namespace gdn = xllm::kernel::gdn;

constexpr int64_t kH = 2, kHV = 4;

/// Packed tokens of sequences, q and k not normalised.
struct Tokens {
  int64_t T, K, V;
  at::Tensor q, k, v, g, beta;

  Tokens(int64_t num_tokens, int64_t key_dim, int64_t value_dim, at::ScalarType dtype)
      : T(num_tokens), K(key_dim), V(value_dim) {
    q = normal({T, kH, K}, dtype);
    k = normal({T, kH, K}, dtype);
    v = normal({T, kHV, V}, dtype);
    g = -at::rand({T, kHV});
    beta = at::rand({T, kHV}).to(dtype);
  }
};

/// The rule over one sequence of the tokens.
std::pair<at::Tensor, at::Tensor> truth(const Tokens& x, bool normalise, int64_t begin, int64_t length,
                                        const at::Tensor& S0, double scale) {
  const auto rows = [&](const at::Tensor& t) { return t.narrow(0, begin, length); };
  const at::Tensor q = normalise ? unit(x.q) : x.q, k = normalise ? unit(x.k) : x.k;
  return token_rule(rows(q), rows(k), rows(x.v), rows(x.g), rows(x.beta), S0, scale);
}

struct SlotTokens {
  std::vector<int32_t> lengths, slots, accepted;  // slots: one for each token
  bool has_start;
};

void check_recurrent(const SlotTokens& c, const Types& types) {
  const int64_t T = static_cast<int64_t>(c.slots.size()), N = static_cast<int64_t>(c.lengths.size());
  Tokens x(T, 64, 32, types.tokens);
  x.q = unit(x.q).to(types.tokens);
  x.k = unit(x.k).to(types.tokens);
  at::Tensor pool = poisoned({11, kHV, x.V, x.K}, types.states);
  std::vector<int64_t> begins{0}, first_slots;
  for (int64_t n = 0; n < N; ++n) {
    const int32_t token = c.accepted.empty() ? 0 : c.accepted[n] - 1;
    first_slots.push_back(c.slots[begins[n] + token]);
    pool[first_slots[n]].copy_(at::randn({kHV, x.V, x.K}));
    begins.push_back(begins[n] + c.lengths[n]);
  }
  const at::Tensor before = pool.clone();
  at::Tensor state = on_device(pool);
  std::vector<int32_t> lengths = c.lengths;
  if (c.has_start) lengths.insert(lengths.begin(), 0);
  const std::optional<at::Tensor> accepted =
      c.accepted.empty() ? std::nullopt : std::optional(on_device(i32(c.accepted)));
  const at::Tensor out = gdn::recurrent_gated_delta_rule(
      on_device(x.q), on_device(x.k), on_device(x.v), state, on_device(x.beta), 0.2, on_device(i32(lengths)),
      on_device(i32(c.slots)), accepted, on_device(x.g), std::nullopt);
  for (int64_t n = 0; n < N; ++n) {
    const auto [o, S] = truth(x, false, begins[n], c.lengths[n], before[first_slots[n]], 0.2);
    expect_close(out.narrow(0, begins[n], c.lengths[n]), o, types.bound, "outputs");
    for (int64_t t = 0; t < c.lengths[n]; ++t)
      expect_close(state[c.slots[begins[n] + t]], S[t + 1], types.bound, "state");
  }
  expect_others_untouched(before, state, std::vector<int64_t>(c.slots.begin(), c.slots.end()));
}

TEST(XllmRecurrentRule, DecodesInThePool) {
  for (const Types& t : types()) check_recurrent({{1, 1, 1}, {7, 2, 9}, {}, true}, t);
}

TEST(XllmRecurrentRule, VerifiesRaggedDrafts) {
  const std::vector<int32_t> lengths{3, 1, 2}, slots{5, 1, 8, 2, 10, 3};
  for (const Types& t : types()) {
    check_recurrent({lengths, slots, {3, 1, 2}, true}, t);
    check_recurrent({lengths, slots, {1, 1, 1}, false}, t);
    check_recurrent({lengths, slots, {}, true}, t);
  }
}

TEST(XllmRecurrentRule, TakesGatesForGranted) {
  const Types t = types().back();
  Tokens x(2, 64, 64, t.tokens);
  x.g.zero_();
  x.beta.fill_(1);
  const at::Tensor before = normal({2, kHV, x.V, x.K}, t.states);
  at::Tensor state = on_device(before.clone());
  const at::Tensor q = unit(x.q).to(t.tokens), k = unit(x.k).to(t.tokens);
  const at::Tensor out = gdn::recurrent_gated_delta_rule(
      on_device(q), on_device(k), on_device(x.v), state, std::nullopt, 1.0, on_device(i32({0, 1, 1})),
      on_device(i32({1, 0})), std::nullopt, std::nullopt, std::nullopt);
  for (int64_t n = 0; n < 2; ++n) {
    const auto [want, states] = token_rule(q.narrow(0, n, 1), k.narrow(0, n, 1), x.v.narrow(0, n, 1),
                                           x.g.narrow(0, n, 1), x.beta.narrow(0, n, 1), before[1 - n], 1.0);
    expect_close(out[n], want[0], t.bound, "outputs");
    expect_close(state[1 - n], states[1], t.bound, "states");
  }
}

TEST(XllmRecurrentRule, RefusesWhatItCannotServe) {
  at::Tensor state = at::zeros({2, 1, 16, 16});
  const at::Tensor x = at::zeros({2, 1, 16}), lengths = i32({0, 1, 1}), slots = i32({0, 1});
  const auto call = [&](const at::Tensor& l, const at::Tensor& s, const std::optional<at::Tensor>& gk) {
    gdn::recurrent_gated_delta_rule(x, x, x, state, std::nullopt, 1.0, l, s, std::nullopt, std::nullopt, gk);
  };
  expect_error<UnsupportedError>([&] { call(lengths, slots, x); }, {"recurrent_gated_delta_rule", "gk"});
  expect_error<RangeError>([&] { call(i32({0, 1, 2}), slots, {}); }, {"actual_seq_lengths", "T=2", "got 3"});
  expect_error<ShapeError>([&] { call(lengths, i32({0}), {}); }, {"ssm_state_indices", "T=2", "[1]"});
}

TEST(XllmSigmoidGatingUpdate, DecodesAndSkipsPadding) {
  for (const Types& t : types()) {
    const std::vector<int32_t> slots{4, -1, 2};
    Tokens x(3, 64, 32, t.tokens);
    const at::Tensor a = normal({3, 1, kHV}, t.tokens), b = normal({3, 1, kHV}, t.tokens);
    const at::Tensor A_log = at::randn({kHV}), dt_bias = at::randn({kHV});
    at::Tensor pool = poisoned({6, kHV, x.K, x.V}, t.states);
    for (const int64_t slot : {4, 2}) pool[slot].copy_(at::randn({kHV, x.K, x.V}));
    const at::Tensor state = on_device(pool.clone());
    xllm::kernel::FusedSigmoidGatingDeltaRuleUpdateParams params{.A_log = on_device(A_log),
                                                                 .a = on_device(a),
                                                                 .dt_bias = on_device(dt_bias),
                                                                 .q = on_device(x.q.unsqueeze(1)),
                                                                 .k = on_device(x.k.unsqueeze(1)),
                                                                 .v = on_device(x.v.unsqueeze(1)),
                                                                 .b = on_device(b),
                                                                 .initial_state_source = state,
                                                                 .initial_state_indices = on_device(i32(slots)),
                                                                 .cu_seqlens = on_device(i32({0, 1, 2, 3})),
                                                                 .scale = 0.2F,
                                                                 .use_qk_l2norm_in_kernel = true};
    const at::Tensor out = gdn::fused_sigmoid_gating_delta_rule_update(params);
    ASSERT_EQ(out.sizes(), at::IntArrayRef({3, 1, kHV, x.V}));
    std::tie(x.g, x.beta) = gates(a.squeeze(1), b.squeeze(1), A_log, dt_bias);
    for (const int64_t n : {0, 2}) {
      const auto [o, S] = truth(x, true, n, 1, pool[slots[n]].transpose(-1, -2), 0.2);
      expect_close(out[n], o, t.bound, "outputs");
      expect_close(state[slots[n]].transpose(-1, -2), S[1], t.bound, "state");
    }
    EXPECT_TRUE(at::equal(out[1].cpu(), at::zeros_like(out[1].cpu()))) << "a padded row";
    expect_others_untouched(pool, state, {4, 2});

    params.initial_state_indices = on_device(i32({-1, -1, -1}));
    const at::Tensor kept = state.cpu().clone();
    gdn::fused_sigmoid_gating_delta_rule_update(params);
    expect_others_untouched(kept, state, {});
  }
}

TEST(XllmSigmoidGatingUpdate, RefusesWhatItCannotServe) {
  using Params = xllm::kernel::FusedSigmoidGatingDeltaRuleUpdateParams;
  const auto refused = [](const std::function<void(Params&)>& change, const char* word) {
    Params params{};
    change(params);
    expect_error<UnsupportedError>([&] { gdn::fused_sigmoid_gating_delta_rule_update(params); }, {word});
  };
  refused([](Params& p) { p.is_kda = true; }, "is_kda");
  refused([](Params& p) { p.softplus_beta = 2; }, "softplus_beta");
  refused([](Params& p) { p.softplus_threshold = 5; }, "softplus_threshold");
  refused([](Params& p) { p.num_accepted_tokens = i32({1}); }, "num_accepted_tokens");
}

TEST(XllmFusedRecurrentRule, VerifiesInThePoolAndSkipsPadding) {
  for (const Types& t : types()) {
    const int64_t N = 4, L = 3;
    const std::vector<int32_t> slots{3, 9, 1, 7, 2, 5, -1, -1, -1, 11, 0, 6}, accepted{1, 3, 1, 2};
    const auto first_slot = [&](int64_t n) { return slots[n * L + accepted[n] - 1]; };
    Tokens x(N * L, 64, 32, t.tokens);
    at::Tensor pool = poisoned({12, kHV, x.K, x.V}, t.states);
    for (const int64_t n : {0, 1, 3}) pool[first_slot(n)].copy_(at::randn({kHV, x.K, x.V}));
    const at::Tensor state = on_device(pool.clone());
    xllm::kernel::FusedRecurrentGatedDeltaRuleParams params{.q = on_device(x.q.unsqueeze(0)),
                                                            .k = on_device(x.k.unsqueeze(0)),
                                                            .v = on_device(x.v.unsqueeze(0)),
                                                            .g = on_device(x.g.unsqueeze(0)),
                                                            .beta = on_device(x.beta.unsqueeze(0)),
                                                            .scale = 0.2F,
                                                            .initial_state = state,
                                                            .cu_seqlens = on_device(i64({0, 3, 6, 9, 12})),
                                                            .ssm_state_indices = on_device(i32(slots).view({N, L})),
                                                            .num_accepted_tokens = on_device(i32(accepted)),
                                                            .use_qk_l2norm_in_kernel = true};
    const auto [out, last] = gdn::fused_recurrent_gated_delta_rule(params);
    EXPECT_TRUE(last.is_same(state));
    const at::Tensor padded = out[0].narrow(0, 2 * L, L).cpu();
    EXPECT_TRUE(at::equal(padded, at::zeros_like(padded))) << "padded rows";
    for (const int64_t n : {0, 1, 3}) {
      const auto [o, S] = truth(x, true, n * L, L, pool[first_slot(n)].transpose(-1, -2), 0.2);
      expect_close(out[0].narrow(0, n * L, L), o, t.bound, "outputs");
      for (int64_t i = 0; i < L; ++i)
        expect_close(state[slots[n * L + i]].transpose(-1, -2), S[i + 1], t.bound, "state");
    }
    expect_others_untouched(pool, state, std::vector<int64_t>(slots.begin(), slots.end()));
  }
}

TEST(XllmChunkRule, PrefillsRaggedSequences) {
  const std::vector<int32_t> lengths{70, 0, 5, 64};
  const int64_t K = is_npu() ? 128 : 64, V = is_npu() ? 128 : 32;
  for (const Types& t : types()) {
    const Tokens x(139, K, V, t.tokens);
    const at::Tensor initial = normal({4, kHV, K, V}, t.states), kept = initial.clone();
    xllm::kernel::MegaChunkGdnParams params{.q = on_device(x.q.unsqueeze(0)),
                                            .k = on_device(x.k.unsqueeze(0)),
                                            .v = on_device(x.v.unsqueeze(0)),
                                            .g = on_device(x.g.unsqueeze(0)),
                                            .beta = on_device(x.beta.unsqueeze(0)),
                                            .scale = 0.2F,
                                            .initial_state = on_device(initial),
                                            .output_final_state = true,
                                            .cu_seqlens = on_device(i32({0, 70, 70, 75, 139})),
                                            .q_seq_lens = lengths,
                                            .use_qk_l2norm_in_kernel = true};
    const auto [out, final_states] = gdn::mega_chunk_gdn(params);
    EXPECT_EQ(final_states.scalar_type(), at::kFloat);
    ASSERT_EQ(final_states.sizes(), initial.sizes());
    int64_t begin = 0;
    for (int64_t n = 0; n < 4; begin += lengths[n++]) {
      const auto [o, S] = truth(x, true, begin, lengths[n], initial[n].transpose(-1, -2), 0.2);
      if (lengths[n] > 0) expect_close(out[0].narrow(0, begin, lengths[n]), o, t.bound, "outputs");
      expect_close(final_states[n].transpose(-1, -2), S[lengths[n]], t.bound, "state");
    }
    EXPECT_TRUE(same_bits(params.initial_state->cpu(), kept)) << "the given states";

    xllm::kernel::ChunkGatedDeltaRuleParams chunk{.q = params.q,
                                                  .k = params.k,
                                                  .v = params.v,
                                                  .g = params.g,
                                                  .beta = params.beta,
                                                  .scale = params.scale,
                                                  .initial_state = params.initial_state,
                                                  .output_final_state = true,
                                                  .cu_seqlens = params.cu_seqlens,
                                                  .use_qk_l2norm_in_kernel = true};
    const auto [again, states] = gdn::chunk_gated_delta_rule(chunk);
    EXPECT_TRUE(same_bits(again.cpu(), out.cpu()));
    EXPECT_EQ(states.scalar_type(), t.states);
    chunk.output_final_state = false;
    EXPECT_FALSE(gdn::chunk_gated_delta_rule(chunk).second.defined());
    chunk.head_first = true;
    expect_error<UnsupportedError>([&] { gdn::chunk_gated_delta_rule(chunk); }, {"head_first"});
  }
}

TEST(XllmChunkRule, StartsFromZeroInEqualSequences) {
  const at::ScalarType type = types().front().tokens;
  const Tokens x(12, 32, 16, type);
  const auto batch = [](const at::Tensor& t) { return on_device(t.unflatten(0, {2, 6})); };
  xllm::kernel::ChunkGatedDeltaRuleParams params{.q = batch(x.q),
                                                 .k = batch(x.k),
                                                 .v = batch(x.v),
                                                 .g = batch(x.g),
                                                 .beta = batch(x.beta),
                                                 .output_final_state = true,
                                                 .use_qk_l2norm_in_kernel = true};
  if (is_npu()) {  // fp32 states, which the emulated Ascend 910B does not take
    expect_error<UnsupportedError>([&] { gdn::chunk_gated_delta_rule(params); }, {"npu", "bf16 states", "Float"});
    return;
  }
  const auto [out, states] = gdn::chunk_gated_delta_rule(params);
  for (int64_t n = 0; n < 2; ++n) {
    const auto [o, S] = truth(x, true, 6 * n, 6, at::zeros({kHV, 16, 32}), 1 / std::sqrt(32.0));
    expect_close(out[n], o, types().front().bound, "outputs");
    expect_close(states[n].transpose(-1, -2), S[6], types().front().bound, "state");
  }
}

TEST(XllmGates, AreThoseOfTheModels) {
  for (const Types& t : types()) {
    const at::Tensor a = normal({5, kHV}, t.tokens) * 8, b = normal({5, kHV}, t.tokens);
    const at::Tensor A_log = at::randn({kHV}), dt_bias = at::randn({kHV});
    xllm::kernel::FusedGdnGatingParams params{
        .A_log = on_device(A_log), .a = on_device(a), .b = on_device(b), .dt_bias = on_device(dt_bias)};
    const auto [g, beta] = gdn::fused_gdn_gating(params);
    const auto [want_g, want_beta] = gates(a, b, A_log, dt_bias);
    expect_close(g, want_g.unsqueeze(0), 1e-6, "g");
    expect_close(beta, want_beta.unsqueeze(0), t.bound, "beta");
    EXPECT_EQ(g.scalar_type(), at::kFloat);
    EXPECT_EQ(beta.scalar_type(), t.tokens);
    params.beta = 2;
    expect_error<UnsupportedError>([&] { gdn::fused_gdn_gating(params); }, {"fused_gdn_gating", "beta", "got 2"});
  }
}

TEST(XllmNorms, AreThoseOfTheModels) {
  for (const Types& t : types()) {
    const at::Tensor x = normal({6, 32}, t.tokens), z = normal({6, 32}, t.tokens), weight = normal({32}, t.tokens);
    xllm::kernel::GatedLayerNormParams params{
        .x = on_device(x), .weight = on_device(weight), .bias = {}, .eps = 1e-5, .z = on_device(z), .group_size = 32};
    expect_close(gdn::gated_layer_norm(params), gated_norm(x, z, weight, 1e-5), t.bound, "gated norm");
    at::Tensor given = on_device(x);
    expect_close(gdn::l2_norm(given), unit(x), t.bound, "l2 norm");
    params.norm_before_gate = false;
    expect_error<UnsupportedError>([&] { gdn::gated_layer_norm(params); }, {"norm_before_gate", "true, true"});
    params.norm_before_gate = true;
    params.group_size = 16;
    expect_error<UnsupportedError>([&] { gdn::gated_layer_norm(params); }, {"group_size", "32", "got 16"});
    params.z.reset();
    expect_error<UnsupportedError>([&] { gdn::gated_layer_norm(params); }, {"z", "a gate"});
  }
}

}  // namespace
}  // namespace xgdn::testing
