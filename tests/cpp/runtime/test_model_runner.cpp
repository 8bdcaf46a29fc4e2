// SPDX-License-Identifier: Apache-2.0
// Steps on the device: buffers that stay, decodes that are padded, tokens for several rows of the same logits.
#include "core/runtime/model_runner.h"

#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

constexpr int64_t kSlots = 8;
constexpr int64_t kBlockSize = 16;

/// Whether every op of the last step promised bits that the other rows do not change.
bool was_batch_invariant() {
  constexpr std::array<std::string_view, 7> kOps{"linear",          "gdn_decode_step", "paged_attention", "rms_norm",
                                                 "rms_norm_linear", "store_kv",        "sigmoid_and_mul"};
  return std::ranges::all_of(kOps, [](std::string_view op) { return kernel::last_is_batch_invariant(op); });
}

/// Pools that are NaN wherever no sequence has written, and the runner that steps over them.
class Device {
 public:
  Device(const std::shared_ptr<const HybridDecoder>& model, std::vector<int64_t> decode_buckets)
      : options_{.max_batch_size = kSlots,
                 .max_cached_tokens = kSlots * 4 * kBlockSize,
                 .kv_block_size = kBlockSize,
                 .decode_buckets = std::move(decode_buckets)},
        states_(model->state_specs(), kSlots, c10::kCPU),
        kv_(kv_spec(*model, kBlockSize), num_kv_blocks(*model, options_), c10::kCPU),
        runner_(model, options_, states_, kv_) {
    for (const at::Tensor& pool : pools()) pool.fill_(kNaN);
  }

  /// One step of the sequences 0.., each of which has slot n + 1 and the blocks 4 n.. of its own.
  void step(SegmentKind kind, const std::vector<std::vector<int32_t>>& tokens, int64_t num_cached) {
    std::vector<SequenceStep> steps;
    for (size_t n = 0; n < tokens.size(); ++n) {
      const auto slot = static_cast<int32_t>(n) + 1;
      const auto block = static_cast<int32_t>(4 * n);
      steps.push_back({.kind = kind,
                       .tokens = tokens[n],
                       .num_cached = num_cached,
                       .state_slots = {slot},
                       .write_slot = slot,
                       .conv_slot = slot,
                       .conv_write_slot = slot,
                       .has_initial_state = num_cached > 0,
                       .kv_blocks = {block, block + 1, block + 2, block + 3}});
    }
    runner_.launch(steps);
    runner_.wait();
  }

  std::vector<at::Tensor> pools() {
    std::vector<at::Tensor> pools;
    for (const GdnState& layer : states_.layers()) {
      for (const GdnState::Component& component : layer.components()) pools.push_back(component.pool);
    }
    for (const KvPool& layer : kv_.layers()) pools.insert(pools.end(), {layer.k, layer.v});
    return pools;
  }

  const ModelRunner& runner() const { return runner_; }

 private:
  RunnerOptions options_;
  StatePool states_;
  KvCache kv_;
  ModelRunner runner_;
};

class ModelRunnerTest : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  std::shared_ptr<const HybridDecoder> model() const { return tiny_model(config_, weights_, {.dtype = GetParam()}); }

  // Every product has a shape that the cpu backend's own kernel takes where the machine has it.
  static ModelConfig config() {
    ModelConfig c = tiny_config();
    c.linear_num_value_heads = 8;
    c.intermediate_size = 64;
    return c;
  }

  const c10::InferenceMode inference_;
  ModelConfig config_ = config();
  Weights weights_ = tiny_weights(config_);
};

INSTANTIATE_TEST_SUITE_P(Dtypes, ModelRunnerTest, ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST_P(ModelRunnerTest, APaddedDecodeHasTheBitsOfTheUnpaddedOne) {
  const std::shared_ptr<const HybridDecoder> decoder = model();
  Device plain(decoder, {});
  Device padded(decoder, {2, 5});
  const std::vector<std::vector<int32_t>> prompts{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                                  {31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17},
                                                  {5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 9, 9, 9, 9, 9}};
  for (Device* device : {&plain, &padded}) device->step(SegmentKind::kPrefill, prompts, 0);
  const double bound = GetParam() == at::kFloat ? 1e-5 : 3e-2;
  for (int32_t token = 0; token < 4; ++token) {  // over the end of a block
    const std::vector<std::vector<int32_t>> tokens{{token}, {40 + token}, {20}};
    for (Device* device : {&plain, &padded}) device->step(SegmentKind::kDecode, tokens, 15 + token);
    EXPECT_EQ(plain.runner().input().gdn.num_tokens, 3);
    EXPECT_EQ(padded.runner().input().gdn.num_tokens, 5);
    ASSERT_EQ(padded.runner().logits().sizes(), plain.runner().logits().sizes());
    const bool has_bits = was_batch_invariant();
    std::vector<at::Tensor> want = plain.pools(), got = padded.pools();
    want.push_back(plain.runner().logits());
    got.push_back(padded.runner().logits());
    for (size_t i = 0; i < want.size(); ++i) {
      const at::Tensor is_written = at::isfinite(want[i]);
      EXPECT_TRUE(at::isfinite(got[i]).equal(is_written)) << "padding has written, tensor " << i;
      const auto written = [&](const at::Tensor& t) { return t.masked_select(is_written); };
      if (has_bits) {
        EXPECT_TRUE(same_bits(written(got[i]), written(want[i]))) << "tensor " << i;
      } else {
        EXPECT_LE(relative_error(written(got[i]), written(want[i])), bound) << "tensor " << i;
      }
    }
  }
}

TEST_P(ModelRunnerTest, TensorsOfADecodeStayWhereTheyAre) {
  Device device(model(), {4});
  device.step(SegmentKind::kPrefill, {{1, 2, 3}, {4, 5, 6}}, 0);
  std::vector<const void*> first;
  for (int32_t i = 0; i < 3; ++i) {
    device.step(SegmentKind::kDecode, {{i}, {i + 1}}, 3 + i);
    const StepInput& input = device.runner().input();
    const Segment& segment = input.gdn.segments.at(0);
    std::vector<const void*> addresses;
    for (const at::Tensor& t :
         {input.token_ids, input.logit_rows, input.attention.positions, input.attention.slot_mapping,
          input.attention.block_table, input.attention.context_lens, input.attention.cu_seqlens, segment.cu_seqlens,
          segment.state_slots.read, segment.conv_slots.read}) {
      addresses.push_back(t.const_data_ptr());
    }
    if (i == 0) first = addresses;
    EXPECT_EQ(addresses, first) << "step " << i;
  }
}

TEST_P(ModelRunnerTest, SeveralRowsMaySampleFromOneSequence) {
  Device device(model(), {});
  device.step(SegmentKind::kPrefill, {{1, 2, 3}, {4, 5, 6}}, 0);
  Sampler greedy({.logprobs = 3}), random({.temperature = 1.0, .seed = 7}), other({});
  const std::vector<std::vector<SampledToken>> sampled =
      device.runner().sample({{1, &greedy}, {0, &other}, {1, &random}});
  ASSERT_EQ(sampled.size(), 3u);
  const at::Tensor best = device.runner().logits().argmax(-1);
  EXPECT_EQ(sampled[0].at(0).token, best[1].item<int64_t>());
  EXPECT_EQ(sampled[1].at(0).token, best[0].item<int64_t>());
  EXPECT_EQ(sampled[0].at(0).logprobs.value().top.size(), 3u);
  EXPECT_EQ(sampled[0].at(0).logprobs->top[0].token, sampled[0].at(0).token);
  EXPECT_FALSE(sampled[1].at(0).logprobs || sampled[2].at(0).logprobs);
  const float* row = device.runner().logits()[1].const_data_ptr<float>();
  EXPECT_EQ(sampled[2].at(0).token,
            Sampler({.temperature = 1.0, .seed = 7}).sample({row, static_cast<size_t>(config_.vocab_size)}));
  EXPECT_THROW(device.runner().sample({{2, &greedy}}), std::out_of_range);
}

}  // namespace
}  // namespace xgdn::testing
