// SPDX-License-Identifier: Apache-2.0
// The feed-forward halves against their formulas in double, and both ways of storing experts.
#include "core/layers/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "core/models/rounded_weights.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_weights.h"

namespace xgdn::testing {
namespace {

constexpr double kMlpBound = 1e-5;  // f32, sums of up to 48 terms

void put_mlp(Weights& weights, const std::string& prefix, int64_t hidden, int64_t intermediate, RandomTensors& random) {
  weights[prefix + "gate_proj.weight"] = random.projection(intermediate, hidden);
  weights[prefix + "up_proj.weight"] = random.projection(intermediate, hidden);
  weights[prefix + "down_proj.weight"] = random.projection(hidden, intermediate);
}

at::Tensor mlp_truth(const Weights& weights, const std::string& prefix, const at::Tensor& x) {
  const auto w = [&](const char* name) { return weights.at(prefix + name).to(at::kDouble); };
  return at::linear(at::silu(at::linear(x, w("gate_proj.weight"))) * at::linear(x, w("up_proj.weight")),
                    w("down_proj.weight"));
}

TEST(Mlp, IsTheFormula) {
  RandomTensors random(1);
  Weights weights;
  put_mlp(weights, "mlp.", 32, 48, random);
  const at::Tensor x = random.normal({5, 32});
  const Mlp mlp(TensorMap(weights), "mlp.", 32, 48, at::kFloat);
  EXPECT_LE(relative_error(mlp.forward(x), mlp_truth(weights, "mlp.", x.to(at::kDouble))), kMlpBound);
}

Weights with_fused_experts(Weights weights, int64_t num_experts) {
  std::vector<at::Tensor> gate_up, down;
  for (int64_t e = 0; e < num_experts; ++e) {
    const std::string prefix = "moe.experts." + std::to_string(e) + ".";
    gate_up.push_back(at::cat({weights.at(prefix + "gate_proj.weight"), weights.at(prefix + "up_proj.weight")}));
    down.push_back(weights.at(prefix + "down_proj.weight"));
    for (const char* name : {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}) weights.erase(prefix + name);
  }
  weights["moe.experts.gate_up_proj"] = at::stack(gate_up);
  weights["moe.experts.down_proj"] = at::stack(down);
  return weights;
}

// Sums in place of a group: every rank adds what it has to what came before.
class Adder : public AllReduce {
 public:
  void sum(at::Tensor& tensor) override {
    sum_ = sum_.defined() ? sum_ + tensor : tensor.clone();
    tensor.copy_(sum_);
    ++num_calls;
  }

  int num_calls = 0;

 private:
  at::Tensor sum_;
};

TEST(Mlp, RanksAddUpToTheWhole) {
  RandomTensors random(1);
  Weights weights;
  put_mlp(weights, "mlp.", 32, 48, random);
  const at::Tensor x = random.normal({5, 32});
  for (const int64_t world : {2, 3, 16}) {
    const auto adder = std::make_shared<Adder>();
    at::Tensor sum;
    for (int64_t rank = 0; rank < world; ++rank) {
      const Mlp mlp(TensorMap(weights), "mlp.", 32, 48, at::kFloat, {}, {.rank = rank, .world = world, .group = adder});
      int64_t elements = 0;
      for (const at::Tensor& weight : mlp.weights()) elements += weight.numel();
      EXPECT_EQ(elements, 3 * 32 * 48 / world);
      sum = mlp.forward(x);
    }
    EXPECT_LE(relative_error(sum, mlp_truth(weights, "mlp.", x.to(at::kDouble))), kMlpBound);
    EXPECT_EQ(adder->num_calls, world) << "one sum a forward";
  }
  expect_error<ShapeError>([&] { Mlp(TensorMap(weights), "mlp.", 32, 48, at::kFloat, {}, {.rank = 0, .world = 5}); },
                           {"[Mlp] shard", "divides intermediate_size=48", "got 5"});
}

class SparseMoeTest : public ::testing::TestWithParam<bool> {
 protected:
  SparseMoeTest()
      : config_{.hidden_size = 32,
                .num_experts = 6,
                .num_experts_per_tok = 2,
                .intermediate_size = 24,
                .shared_intermediate_size = 48,
                .norm_topk_prob = GetParam()} {
    RandomTensors random(2);
    weights_["moe.gate.weight"] = random.projection(6, 32);
    weights_["moe.shared_expert_gate.weight"] = random.projection(1, 32);
    put_mlp(weights_, "moe.shared_expert.", 32, 48, random);
    for (int64_t e = 0; e < 6; ++e) put_mlp(weights_, expert(e), 32, 24, random);
    x_ = random.normal({9, 32});
  }

  static std::string expert(int64_t e) { return "moe.experts." + std::to_string(e) + "."; }

  at::Tensor truth() const {
    const at::Tensor x = x_.to(at::kDouble);
    const at::Tensor p = at::softmax(at::linear(x, weights_.at("moe.gate.weight").to(at::kDouble)), -1);
    at::Tensor out = at::zeros({x.size(0), 32}, at::kDouble);
    for (int64_t t = 0; t < x.size(0); ++t) {
      const double* row = p.const_data_ptr<double>() + t * 6;
      std::vector<int64_t> order(6);
      std::iota(order.begin(), order.end(), 0);
      std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
      const double total = config_.norm_topk_prob ? row[order[0]] + row[order[1]] : 1.0;
      for (int i = 0; i < 2; ++i) out[t] += mlp_truth(weights_, expert(order[i]), x[t]) * (row[order[i]] / total);
    }
    const at::Tensor gate = at::sigmoid(at::linear(x, weights_.at("moe.shared_expert_gate.weight").to(at::kDouble)));
    return out + gate * mlp_truth(weights_, "moe.shared_expert.", x);
  }

  SparseMoe moe(const Weights& weights) const { return {config_, TensorMap(weights), "moe.", at::kFloat}; }

  SparseMoeConfig config_;
  Weights weights_;
  at::Tensor x_;
};

INSTANTIATE_TEST_SUITE_P(SparseMoe, SparseMoeTest, ::testing::Bool());

TEST_P(SparseMoeTest, IsTheFormula) {
  EXPECT_LE(relative_error(moe(weights_).forward(x_), truth()), kMlpBound);
}

TEST_P(SparseMoeTest, ExpertsMayBeOneTensor) {
  Weights fused = with_fused_experts(weights_, 6);
  EXPECT_LE(relative_error(moe(fused).forward(x_), moe(weights_).forward(x_)), kMlpBound);
  fused.erase("moe.experts.down_proj");
  expect_error<CheckpointError>([&] { moe(fused); }, {"moe.experts.down_proj"});
}

TEST_P(SparseMoeTest, RanksAddUpToTheWhole) {
  for (const Weights& weights : {weights_, with_fused_experts(weights_, 6)}) {
    for (const int64_t world : {2, 4}) {
      const auto adder = std::make_shared<Adder>();
      at::Tensor sum;
      for (int64_t rank = 0; rank < world; ++rank) {
        sum = SparseMoe(config_, TensorMap(weights), "moe.", at::kFloat, {},
                        {.rank = rank, .world = world, .group = adder})
                  .forward(x_);
      }
      EXPECT_LE(relative_error(sum, truth()), kMlpBound) << world << " ranks";
      EXPECT_EQ(adder->num_calls, world) << "one sum a forward";
    }
  }
  expect_error<ShapeError>(
      [&] { SparseMoe(config_, TensorMap(weights_), "moe.", at::kFloat, {}, {.rank = 0, .world = 16}); },
      {"divides intermediate_size=24", "got 16"});
}

TEST_P(SparseMoeTest, RoundedExpertsAreCutBetweenTheirGroups) {
  SparseMoeConfig config = config_;
  config.intermediate_size = config.shared_intermediate_size = 64;
  RandomTensors random(8);
  Weights weights = weights_;
  put_mlp(weights, "moe.shared_expert.", 32, 64, random);
  for (int64_t e = 0; e < 6; ++e) put_mlp(weights, expert(e), 32, 64, random);
  for (const Weights& stored : {weights, with_fused_experts(weights, 6)}) {
    const TensorMap plain(stored);
    const RoundedWeights rounded(plain, kernel::WeightFormat::kInt4);
    const at::Tensor want = SparseMoe(config, rounded, "moe.", at::kFloat).forward(x_);
    at::Tensor sum = at::zeros_like(want);
    for (const int64_t rank : {0, 1}) {
      sum += SparseMoe(config, rounded, "moe.", at::kFloat, {}, {.rank = rank, .world = 2}).forward(x_);
    }
    EXPECT_LE(relative_error(sum, want), 1e-5);
    expect_error<UnsupportedError>([&] { SparseMoe(config, rounded, "moe.", at::kFloat, {}, {.rank = 0, .world = 4}); },
                                   {"down_proj", "cannot be split between ranks", "groups of 32"});
  }
}

TEST_P(SparseMoeTest, NaNStaysInItsToken) {
  const at::Tensor want = moe(weights_).forward(x_);
  at::Tensor broken = x_.clone();
  broken[4].fill_(kNaN);
  const at::Tensor got = moe(weights_).forward(broken);
  for (int64_t t = 0; t < 9; ++t) {
    if (t == 4) {
      EXPECT_FALSE(at::isfinite(got[t]).any().item<bool>());
    } else {
      EXPECT_LE(relative_error(got[t], want[t]), 1e-6) << "token " << t;
    }
  }
}

}  // namespace
}  // namespace xgdn::testing
