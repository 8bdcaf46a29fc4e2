// SPDX-License-Identifier: Apache-2.0
// The adapter's convolutions against float64 as xLLM's C++ layer calls them.
#include "ops_api.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

namespace gdn = xllm::kernel::gdn;

constexpr int64_t kD = 24, kW = 4, kHistory = kW - 1;

TEST(XllmCausalConv1d, PrefillsPrompts) {
  for (const Types& t : types()) {
    const std::vector<int64_t> starts{0, 5, 7, 8}, slots{6, 3, 2}, modes{1, 0, 0};
    const at::Tensor x = normal({8, kD}, t.tokens), weight = normal({kW, kD}, t.tokens), bias = normal({kD}, t.tokens);
    at::Tensor pool = poisoned({8, kHistory, kD}, t.tokens);
    pool[6].copy_(at::randn({kHistory, kD}));  // slot 2 holds NaN, which a new prompt must not see
    const at::Tensor state = on_device(pool.clone()), out = on_device(poisoned({8, kD}, t.tokens));
    gdn::causal_conv1d_out(out, on_device(x), on_device(weight), state, on_device(bias), starts, slots, modes, {}, 1,
                           /*pad_slot_id=*/3, /*run_mode=*/0);
    const at::Tensor zeros = at::zeros({kHistory, kD}), taps = weight.t();
    expect_close(out.narrow(0, 0, 5), convolution(x.narrow(0, 0, 5), taps, pool[6], bias), t.bound, "a chunk");
    expect_close(out.narrow(0, 7, 1), convolution(x.narrow(0, 7, 1), taps, zeros, bias), t.bound, "a new prompt");
    EXPECT_TRUE(at::equal(out.narrow(0, 5, 2).cpu(), at::zeros({2, kD}, t.tokens))) << "padded rows";
    EXPECT_TRUE(same_bits(state[6].cpu(), x.narrow(0, 2, 3)));
    EXPECT_TRUE(at::equal(state[2].cpu(), at::cat({at::zeros({2, kD}, t.tokens), x.narrow(0, 7, 1)})));
    expect_others_untouched(pool, state, {6, 2});
  }
}

TEST(XllmCausalConv1d, UpdatesDrafts) {
  for (const Types& t : types()) {
    const int64_t N = 2, L = 3, R = kHistory + L - 1;
    const std::vector<int64_t> slots{3, 1}, accepted{1, 3};
    const at::Tensor x = normal({N, L, kD}, t.tokens), weight = normal({kW, kD}, t.tokens);
    at::Tensor pool = poisoned({5, R, kD}, t.tokens);
    for (const int64_t slot : slots) pool[slot].copy_(at::randn({R, kD}));
    const at::Tensor state = on_device(pool.clone());
    const at::Tensor out = gdn::causal_conv1d(on_device(x), on_device(weight), state, std::nullopt, {0, 3, 6}, slots,
                                              {}, accepted, 1, -1, /*run_mode=*/1);
    ASSERT_EQ(out.sizes(), x.sizes());
    for (int64_t n = 0; n < N; ++n) {
      const at::Tensor history = pool[slots[n]].narrow(0, accepted[n] - 1, kHistory);
      expect_close(out[n], convolution(x[n], weight.t(), history), t.bound, "outputs");
      EXPECT_TRUE(same_bits(state[slots[n]].cpu(), at::cat({history, x[n]}).slice(0, 1)));
    }
    expect_others_untouched(pool, state, slots);
  }
}

TEST(XllmCausalConv1d, RefusesWhatItCannotServe) {
  const at::Tensor x = at::zeros({2, kD}), weight = at::zeros({kW, kD}), state = at::zeros({2, kHistory, kD});
  const auto call = [&](at::IntArrayRef starts, at::IntArrayRef modes, at::IntArrayRef accepted, int64_t activation,
                        int64_t run_mode) {
    gdn::causal_conv1d(x, weight, state, std::nullopt, starts, {0, 1}, modes, accepted, activation, -1, run_mode);
  };
  expect_error<UnsupportedError>([&] { call({0, 1, 2}, {1, 1}, {}, 1, 2); }, {"run_mode", "0 or 1", "got 2"});
  expect_error<UnsupportedError>([&] { call({0, 1, 2}, {1, 1}, {}, 3, 0); }, {"activation_mode", "got 3"});
  expect_error<ShapeError>([&] { call({0, 2}, {1, 1}, {}, 1, 0); }, {"query_start_loc", "3 values", "got 2"});
  expect_error<ShapeError>([&] { call({0, 1, 2}, {1}, {}, 1, 0); }, {"initial_state_mode", "2 values", "got 1"});
  expect_error<ShapeError>([&] { call({0, 1, 2}, {}, {1}, 1, 1); }, {"num_accepted_tokens", "2 values", "got 1"});
}

TEST(XllmCausalConv1dUpdate, DecodesAndSkipsPadding) {
  for (const Types& t : types()) {
    const at::Tensor x = normal({3, kD}, t.tokens), weight = normal({kW, kD}, t.tokens);
    at::Tensor pool = poisoned({5, kHistory, kD}, t.tokens);
    for (const int64_t slot : {3, 0}) pool[slot].copy_(at::randn({kHistory, kD}));
    const at::Tensor state = on_device(pool.clone());
    xllm::kernel::CausalConv1dUpdateParams params{.x = on_device(x),
                                                  .conv_state = state,
                                                  .weight = on_device(weight),
                                                  .conv_state_indices = on_device(i32({3, 4, 0})),
                                                  .query_start_loc = on_device(i32({0, 1, 2, 3})),
                                                  .max_query_len = 1,
                                                  .pad_slot_id = 4};
    const at::Tensor out = gdn::causal_conv1d_update(params);
    for (const auto& [n, slot] : {std::pair{0, 3}, std::pair{2, 0}}) {
      expect_close(out[n], convolution(x.narrow(0, n, 1), weight.t(), pool[slot])[0], t.bound, "outputs");
      EXPECT_TRUE(same_bits(state[slot].cpu(), at::cat({pool[slot].slice(0, 1), x.narrow(0, n, 1)})));
    }
    EXPECT_TRUE(at::equal(out[1].cpu(), at::zeros({kD}, t.tokens))) << "a padded row";
    expect_others_untouched(pool, state, {3, 0});
  }
}

TEST(XllmCausalConv1dUpdate, TakesSlotsAndOffsetsForGranted) {
  const Types t = types().front();
  const at::Tensor x = normal({2, 2, kD}, t.tokens), weight = normal({kW, kD}, t.tokens);
  const at::Tensor pool = normal({2, kHistory + 1, kD}, t.tokens), state = on_device(pool.clone());
  xllm::kernel::CausalConv1dUpdateParams params{.x = on_device(x), .conv_state = state, .weight = on_device(weight)};
  params.num_accepted_tokens = on_device(i32({2, 1}));
  const at::Tensor out = gdn::causal_conv1d_update(params);
  ASSERT_EQ(out.sizes(), x.sizes());
  for (int64_t n = 0; n < 2; ++n)
    expect_close(out[n], convolution(x[n], weight.t(), pool[n].narrow(0, 1 - n, kHistory)), t.bound, "outputs");
}

TEST(XllmCausalConv1dUpdate, RefusesWhatItCannotServe) {
  xllm::kernel::CausalConv1dUpdateParams params{
      .x = at::zeros({1, kD}), .conv_state = at::zeros({1, kHistory, kD}), .weight = at::zeros({kW, kD})};
  params.conv_state_indices = i32({0, 0}).view({1, 2});
  expect_error<UnsupportedError>([&] { gdn::causal_conv1d_update(params); }, {"conv_state_indices", "block-wise"});
  params.conv_state_indices.reset();
  params.initial_state_mode = i32({1});
  expect_error<UnsupportedError>([&] { gdn::causal_conv1d_update(params); }, {"initial_state_mode"});
  params.initial_state_mode.reset();
  params.x = at::zeros({5, kD});
  params.max_query_len = 2;
  expect_error<ShapeError>([&] { gdn::causal_conv1d_update(params); }, {"max_query_len", "T=5", "got 2"});
}

TEST(XllmCausalConv1dUpdate, TakesSequencesWithoutTokens) {
  const Types t = types().front();
  const at::Tensor pool = normal({2, kHistory, kD}, t.tokens), state = on_device(pool.clone());
  xllm::kernel::CausalConv1dUpdateParams params{.x = on_device(normal({2, 0, kD}, t.tokens)),
                                                .conv_state = state,
                                                .weight = on_device(normal({kW, kD}, t.tokens))};
  const at::Tensor out = gdn::causal_conv1d_update(params);
  EXPECT_EQ(out.sizes(), params.x.sizes());
  EXPECT_TRUE(same_bits(state.cpu(), pool));
}

}  // namespace
}  // namespace xgdn::testing
