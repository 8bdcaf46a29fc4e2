// SPDX-License-Identifier: Apache-2.0
// The GDN layer against its formulas in double: one step of mixed segments, both checkpoint layouts, every sharding.
#include "core/layers/qwen3_gated_delta_net.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <barrier>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/models/rounded_weights.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_weights.h"

namespace xgdn::testing {
namespace {

const std::string kPrefix = "layer.";
constexpr double kDeltaNetBound = 1e-5;  // f32: sums of up to 128 terms through four stages
constexpr double kRoundedBound = 1e-4;  // beside weights in few bits x has 16: what differs in f32 may be rounded apart

GdnConfig small() {
  return {.hidden_size = 32, .num_k_heads = 2, .num_v_heads = 8, .head_k_dim = 16, .head_v_dim = 32};
}

int64_t key_dim(const GdnConfig& c) {
  return c.num_k_heads * c.head_k_dim;
}
int64_t value_dim(const GdnConfig& c) {
  return c.num_v_heads * c.head_v_dim;
}

Weights gdn_weights(const GdnConfig& c, uint64_t seed = 1) {
  RandomTensors random(seed);
  Weights weights;
  put_gdn(weights, kPrefix, c, random);
  return weights;
}

/// The same weights as Qwen3-Next stores them: for each key head [q | k | v | z] and [b | a].
Weights interleaved(const Weights& separate, const GdnConfig& c) {
  const int64_t ratio = c.num_v_heads / c.num_k_heads;
  const auto rows = [&](const std::string& name, int64_t begin, int64_t count) {
    return separate.at(kPrefix + name).narrow(0, begin, count);
  };
  std::vector<at::Tensor> qkvz, ba;
  for (int64_t h = 0; h < c.num_k_heads; ++h) {
    const int64_t values = ratio * c.head_v_dim;
    qkvz.push_back(rows("in_proj_qkv.weight", h * c.head_k_dim, c.head_k_dim));
    qkvz.push_back(rows("in_proj_qkv.weight", key_dim(c) + h * c.head_k_dim, c.head_k_dim));
    qkvz.push_back(rows("in_proj_qkv.weight", 2 * key_dim(c) + h * values, values));
    qkvz.push_back(rows("in_proj_z.weight", h * values, values));
    ba.push_back(rows("in_proj_b.weight", h * ratio, ratio));
    ba.push_back(rows("in_proj_a.weight", h * ratio, ratio));
  }
  Weights weights = separate;
  for (const char* name : {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"}) {
    weights.erase(kPrefix + name + ".weight");
  }
  weights[kPrefix + "in_proj_qkvz.weight"] = at::cat(qkvz);
  weights[kPrefix + "in_proj_ba.weight"] = at::cat(ba);
  return weights;
}

/// One sequence from its first token on, token by token in double.
struct Truth {
  at::Tensor out;                  // [T, hidden]
  std::vector<at::Tensor> conv;    // after each token [W-1, channels]
  std::vector<at::Tensor> states;  // after each token [HV, V, K]
};

Truth truth(const GdnConfig& c, const Weights& weights, const at::Tensor& hidden) {
  const auto w = [&](const std::string& name) { return weights.at(kPrefix + name).to(at::kDouble); };
  const auto unit = [](const at::Tensor& t) { return t / (t.square().sum(-1, /*keepdim=*/true) + 1e-6).sqrt(); };
  const at::Tensor x = hidden.to(at::kDouble);
  const at::Tensor qkv = at::linear(x, w("in_proj_qkv.weight"));
  const at::Tensor z = at::linear(x, w("in_proj_z.weight")).unflatten(1, {c.num_v_heads, c.head_v_dim});
  const at::Tensor beta = at::sigmoid(at::linear(x, w("in_proj_b.weight")));
  const at::Tensor g =
      -at::exp(w("A_log")) * at::softplus(at::linear(x, w("in_proj_a.weight")) + w("dt_bias"), 1, 1000);
  const at::Tensor taps = w("conv1d.weight").squeeze(1).t();  // [W, channels]
  const bool has_bias = weights.contains(kPrefix + "conv1d.bias");
  const int64_t history = c.conv_kernel_dim - 1;
  const at::Tensor padded = at::cat({at::zeros({history, qkv.size(1)}, at::kDouble), qkv});

  Truth result;
  std::vector<at::Tensor> rows;
  at::Tensor S = at::zeros({c.num_v_heads, c.head_v_dim, c.head_k_dim}, at::kDouble);
  for (int64_t t = 0; t < x.size(0); ++t) {
    at::Tensor mixed = (padded.narrow(0, t, history + 1) * taps).sum(0);
    if (has_bias) mixed = mixed + w("conv1d.bias");
    mixed = at::silu(mixed);
    const auto key_heads = [&](int64_t begin) {
      return unit(mixed.narrow(0, begin, key_dim(c)).view({c.num_k_heads, c.head_k_dim}))
          .repeat_interleave(c.num_v_heads / c.num_k_heads, 0)
          .unsqueeze(-1);  // [HV, K, 1]
    };
    const at::Tensor q = key_heads(0);
    const at::Tensor k = key_heads(key_dim(c));
    const at::Tensor v = mixed.narrow(0, 2 * key_dim(c), value_dim(c)).view({c.num_v_heads, c.head_v_dim, 1});
    S = S * at::exp(g[t]).view({-1, 1, 1});
    const at::Tensor u = (v - at::matmul(S, k)) * beta[t].view({-1, 1, 1});
    S = S + at::matmul(u, k.transpose(1, 2));
    const at::Tensor o = at::matmul(S, q).squeeze(-1) / std::sqrt(static_cast<double>(c.head_k_dim));
    const at::Tensor normed = o / (o.square().mean(-1, /*keepdim=*/true) + c.rms_norm_eps).sqrt();
    rows.push_back((normed * w("norm.weight") * at::silu(z[t])).flatten());
    result.conv.push_back(padded.narrow(0, t + 1, history));
    result.states.push_back(S);
  }
  result.out = at::linear(at::stack(rows), w("out_proj.weight"));
  return result;
}

GdnState make_state(const Qwen3GatedDeltaNet& layer, int64_t num_slots) {
  GdnState state = GdnState::allocate(layer.state_specs(), num_slots, c10::kCPU);
  for (const GdnState::Component& component : state.components()) component.pool.fill_(kNaN);
  return state;
}

Segment prefill(int64_t begin, const std::vector<int64_t>& lengths, const std::vector<int32_t>& slots,
                const std::vector<bool>& has_initial) {
  std::vector<int32_t> cu{0};
  at::Tensor flags = at::empty({std::ssize(lengths)}, at::kBool);
  for (size_t i = 0; i < lengths.size(); ++i) {
    cu.push_back(cu.back() + static_cast<int32_t>(lengths[i]));
    flags.mutable_data_ptr<bool>()[i] = has_initial[i];
  }
  const kernel::ChunkTables chunk = kernel::build_chunk_tables(lengths);
  return {.kind = SegmentKind::kPrefill,
          .token_begin = begin,
          .num_tokens = cu.back(),
          .cu_seqlens = i32(cu),
          .state_slots = {i32(slots)},
          .conv_slots = {i32(slots)},
          .has_initial_state = flags,
          .chunk_indices = i32(chunk.indices).view({-1, 2}),
          .chunk_offsets = i32(chunk.offsets)};
}

Segment decode(int64_t begin, const std::vector<int32_t>& slots) {
  std::vector<int32_t> cu{0};
  for (size_t i = 0; i < slots.size(); ++i) cu.push_back(static_cast<int32_t>(i) + 1);
  return {.kind = SegmentKind::kDecode,
          .token_begin = begin,
          .num_tokens = std::ssize(slots),
          .cu_seqlens = i32(cu),
          .state_slots = {i32(slots)},
          .conv_slots = {i32(slots)}};
}

Segment verify(int64_t begin, int64_t length, const std::vector<int32_t>& table, int32_t num_accepted) {
  return {.kind = SegmentKind::kVerify,
          .token_begin = begin,
          .num_tokens = length,
          .cu_seqlens = i32({0, static_cast<int32_t>(length)}),
          .state_slots = {i32(table).view({1, -1})},
          .conv_slots = {i32({table.front()})},
          .num_accepted = i32({num_accepted}),
          .host = {.max_len = length}};
}

GdnBatch batch_of(std::vector<Segment> segments) {
  GdnBatch batch{.num_tokens = 0, .segments = std::move(segments)};
  for (const Segment& segment : batch.segments) batch.num_tokens += segment.num_tokens;
  return batch;
}

at::Tensor slot(const GdnState& state, StateKind kind, int64_t index) {
  return state.pool(kind)[index];
}

struct LayerCase {
  const char* name;
  GdnConfig config;
  bool has_conv_bias = false;
};
void PrintTo(const LayerCase& c, std::ostream* out) {
  *out << c.name;
}

LayerCase with_sizes(const char* name, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t W, bool bias) {
  GdnConfig c{.hidden_size = 48,
              .num_k_heads = H,
              .num_v_heads = HV,
              .head_k_dim = K,
              .head_v_dim = V,
              .conv_kernel_dim = W,
              .max_draft_tokens = 3};
  return {name, c, bias};
}

class LayerTest : public ::testing::TestWithParam<LayerCase> {
 protected:
  LayerTest() : config_(GetParam().config), weights_(gdn_weights(config_)) {
    if (GetParam().has_conv_bias) {
      weights_[kPrefix + "conv1d.bias"] = RandomTensors(9).normal({2 * key_dim(config_) + value_dim(config_)});
    }
  }
  Qwen3GatedDeltaNet layer() const { return {config_, TensorMap(weights_), kPrefix, at::kFloat}; }
  at::Tensor hidden(uint64_t seed, int64_t num_tokens) const {
    return RandomTensors(seed).normal({num_tokens, config_.hidden_size});
  }
  void expect_state(const GdnState& state, int64_t conv_slot, int64_t delta_slot, const Truth& t, int64_t num_tokens) {
    const int64_t history = config_.conv_kernel_dim - 1;
    EXPECT_LE(relative_error(slot(state, StateKind::kConv, conv_slot).narrow(0, 0, history), t.conv[num_tokens - 1]),
              kDeltaNetBound);
    EXPECT_LE(relative_error(slot(state, StateKind::kDelta, delta_slot), t.states[num_tokens - 1]), kDeltaNetBound);
  }

  GdnConfig config_;
  Weights weights_;
};

INSTANTIATE_TEST_SUITE_P(Qwen3GatedDeltaNet, LayerTest,
                         ::testing::Values(with_sizes("grouped", 2, 4, 16, 16, 4, false),
                                           with_sizes("equal", 2, 2, 32, 16, 4, true),
                                           with_sizes("three", 1, 3, 16, 48, 2, false)),
                         [](const auto& info) { return info.param.name; });

// Four sequences in one call: one decodes, one verifies three tokens, one continues its prompt, one starts. Then the
// verifier goes on from two accepted tokens.
TEST_P(LayerTest, EverySegmentOfAStepIsTheRecurrence) {
  const Qwen3GatedDeltaNet gdn = layer();
  const at::Tensor x[] = {hidden(10, 30), hidden(11, 40), hidden(12, 64 + 70), hidden(13, 5)};
  const Truth want[] = {truth(config_, weights_, x[0]), truth(config_, weights_, x[1]), truth(config_, weights_, x[2]),
                        truth(config_, weights_, x[3])};
  GdnState state = make_state(gdn, 10);

  // Slots 1, 2, 3 of sequences 0, 1, 2.
  const at::Tensor start = gdn.forward(at::cat({x[0].narrow(0, 0, 29), x[1].narrow(0, 0, 20), x[2].narrow(0, 0, 64)}),
                                       batch_of({prefill(0, {29, 20, 64}, {1, 2, 3}, {false, false, false})}), state);
  EXPECT_LE(relative_error(start.narrow(0, 0, 29), want[0].out.narrow(0, 0, 29)), kDeltaNetBound);
  EXPECT_LE(relative_error(start.narrow(0, 29, 20), want[1].out.narrow(0, 0, 20)), kDeltaNetBound);
  EXPECT_LE(relative_error(start.narrow(0, 49, 64), want[2].out.narrow(0, 0, 64)), kDeltaNetBound);
  expect_state(state, 1, 1, want[0], 29);
  expect_state(state, 2, 2, want[1], 20);
  expect_state(state, 3, 3, want[2], 64);

  std::vector<at::Tensor> before;
  for (const GdnState::Component& component : state.components()) before.push_back(component.pool.clone());
  const at::Tensor out = gdn.forward(
      at::cat({x[0].narrow(0, 29, 1), x[1].narrow(0, 20, 3), x[2].narrow(0, 64, 70), x[3]}),
      batch_of({decode(0, {1}), verify(1, 3, {2, 5, 6, 7}, 1), prefill(4, {70, 5}, {3, 4}, {true, false})}), state);
  EXPECT_LE(relative_error(out.narrow(0, 0, 1), want[0].out.narrow(0, 29, 1)), kDeltaNetBound);
  EXPECT_LE(relative_error(out.narrow(0, 1, 3), want[1].out.narrow(0, 20, 3)), kDeltaNetBound);
  EXPECT_LE(relative_error(out.narrow(0, 4, 70), want[2].out.narrow(0, 64, 70)), kDeltaNetBound);
  EXPECT_LE(relative_error(out.narrow(0, 74, 5), want[3].out), kDeltaNetBound);
  expect_state(state, 1, 1, want[0], 30);
  expect_state(state, 3, 3, want[2], 134);
  expect_state(state, 4, 4, want[3], 5);
  const int32_t table[] = {2, 5, 6};
  for (int64_t t = 0; t < 3; ++t) {
    EXPECT_LE(relative_error(slot(state, StateKind::kDelta, table[t]), want[1].states[20 + t]), kDeltaNetBound)
        << "draft " << t;
  }
  // Nobody named slots 0, 8 and 9; the verifier's last column and the conv pool's draft slots were not written.
  for (int64_t i : {0, 8, 9, 7}) {
    EXPECT_TRUE(same_bits(slot(state, StateKind::kDelta, i), before[1][i])) << "delta slot " << i;
  }
  for (int64_t i : {0, 5, 6, 7, 8, 9}) {
    EXPECT_TRUE(same_bits(slot(state, StateKind::kConv, i), before[0][i])) << "conv slot " << i;
  }

  // Two of the three tokens are accepted: other drafts follow the second.
  const at::Tensor other = at::cat({x[1].narrow(0, 0, 22), hidden(14, 4)});
  const Truth other_want = truth(config_, weights_, other);
  const at::Tensor next = gdn.forward(other.narrow(0, 22, 4), batch_of({verify(0, 4, {2, 5, 6, 7}, 2)}), state);
  EXPECT_LE(relative_error(next, other_want.out.narrow(0, 22, 4)), kDeltaNetBound);
  EXPECT_LE(relative_error(slot(state, StateKind::kDelta, 7), other_want.states[25]), kDeltaNetBound);
}

TEST_P(LayerTest, WholePiecesAndSingleTokensAgree) {
  const Qwen3GatedDeltaNet gdn = layer();
  const at::Tensor x = hidden(20, 150);
  const Truth want = truth(config_, weights_, x);

  for (const std::vector<int64_t>& pieces :
       {std::vector<int64_t>{150}, {64, 86}, {64, 64, 22}, std::vector<int64_t>(150, 1)}) {
    GdnState state = make_state(gdn, 2);
    std::vector<at::Tensor> outs;
    int64_t begin = 0;
    for (int64_t count : pieces) {
      const bool is_first = begin == 0;
      const Segment segment = count == 1 && !is_first ? decode(0, {1}) : prefill(0, {count}, {1}, {!is_first});
      outs.push_back(gdn.forward(x.narrow(0, begin, count), batch_of({segment}), state));
      begin += count;
    }
    EXPECT_LE(relative_error(at::cat(outs), want.out), kDeltaNetBound) << pieces.size() << " pieces";
    expect_state(state, 1, 1, want, 150);
  }
}

TEST_P(LayerTest, DecodeWritesWhereItIsTold) {
  const Qwen3GatedDeltaNet gdn = layer();
  const at::Tensor x = hidden(21, 11);
  const Truth want = truth(config_, weights_, x);
  GdnState state = make_state(gdn, 4);
  gdn.forward(x.narrow(0, 0, 10), batch_of({prefill(0, {10}, {1}, {false})}), state);
  const at::Tensor conv = slot(state, StateKind::kConv, 1).clone();
  const at::Tensor delta = slot(state, StateKind::kDelta, 1).clone();
  Segment forked = decode(0, {1, 1});
  forked.state_slots.write = i32({2, 3});
  forked.conv_slots.write = i32({3, 2});
  const at::Tensor last = x.narrow(0, 10, 1);
  const at::Tensor out = gdn.forward(at::cat({last, last * 2}), batch_of({forked}), state);
  EXPECT_LE(relative_error(out.narrow(0, 0, 1), want.out.narrow(0, 10, 1)), kDeltaNetBound);
  expect_state(state, 3, 2, want, 11);
  EXPECT_TRUE(same_bits(slot(state, StateKind::kConv, 1), conv)) << "the fork's origin changed";
  EXPECT_TRUE(same_bits(slot(state, StateKind::kDelta, 1), delta)) << "the fork's origin changed";
}

TEST_P(LayerTest, BothCheckpointLayoutsAreTheSameLayer) {
  const Weights fused = interleaved(weights_, config_);
  const at::Tensor x = hidden(22, 70);
  for (int64_t rank = 0; rank < config_.num_k_heads; ++rank) {
    const Shard shard{.rank = rank, .world = config_.num_k_heads};
    const Qwen3GatedDeltaNet a(config_, TensorMap(weights_), kPrefix, at::kFloat, shard);
    const Qwen3GatedDeltaNet b(config_, TensorMap(fused), kPrefix, at::kFloat, shard);
    GdnState state_a = make_state(a, 1), state_b = make_state(b, 1);
    const GdnBatch batch = batch_of({prefill(0, {70}, {0}, {false})});
    EXPECT_LE(relative_error(a.forward(x, batch, state_a), b.forward(x, batch, state_b)), kDeltaNetBound);
    for (StateKind kind : {StateKind::kConv, StateKind::kDelta}) {
      const at::Tensor got = state_a.pool(kind), want = state_b.pool(kind);
      EXPECT_TRUE(at::equal(got.isnan(), want.isnan()));  // rows that nobody wrote
      EXPECT_LE(relative_error(got.nan_to_num(), want.nan_to_num()), kDeltaNetBound);
    }
  }
}

/// A step that prefills two sequences and one that decodes them.
struct TwoSteps {
  at::Tensor first, second;
};

TwoSteps run_two_steps(const Qwen3GatedDeltaNet& layer, GdnState& state, const at::Tensor& x) {
  TwoSteps out;
  out.first = layer.forward(x.narrow(0, 0, 75), batch_of({prefill(0, {70, 5}, {1, 0}, {false, false})}), state);
  out.second = layer.forward(x.narrow(0, 75, 2), batch_of({decode(0, {0, 1})}), state);
  return out;
}

class ShardTest : public ::testing::TestWithParam<int64_t> {
 protected:
  ShardTest() : config_(small()), weights_(gdn_weights(config_)), x_(RandomTensors(30).normal({77, 32})) {
    const Qwen3GatedDeltaNet whole(config_, TensorMap(weights_), kPrefix, at::kFloat);
    state_ = std::make_unique<GdnState>(make_state(whole, 2));
    out_ = run_two_steps(whole, *state_, x_);
  }

  Qwen3GatedDeltaNet rank(int64_t index, std::shared_ptr<AllReduce> group = nullptr) const {
    return {config_, TensorMap(weights_), kPrefix, at::kFloat,
            Shard{.rank = index, .world = GetParam(), .group = std::move(group)}};
  }

  GdnConfig config_;
  Weights weights_;
  at::Tensor x_;
  std::unique_ptr<GdnState> state_;
  TwoSteps out_;
};

INSTANTIATE_TEST_SUITE_P(Qwen3GatedDeltaNet, ShardTest, ::testing::Values(1, 2, 4, 8));

TEST_P(ShardTest, PartialSumsAndSlicesOfTheStateMakeTheWhole) {
  const int64_t world = GetParam();
  at::Tensor first = at::zeros_like(out_.first), second = at::zeros_like(out_.second);
  for (int64_t r = 0; r < world; ++r) {
    const Qwen3GatedDeltaNet layer = rank(r);
    const GdnConfig& local = layer.local_config();
    EXPECT_EQ(local.num_v_heads, 8 / world);
    EXPECT_EQ(local.num_k_heads, std::max<int64_t>(1, 2 / world));
    GdnState state = make_state(layer, 2);
    const TwoSteps partial = run_two_steps(layer, state, x_);
    first += partial.first;
    second += partial.second;

    const int64_t value_begin = r * local.num_v_heads;
    const int64_t key_begin = value_begin / 4;  // four value heads read one key head
    const at::Tensor delta = state_->pool(StateKind::kDelta).narrow(1, value_begin, local.num_v_heads);
    EXPECT_LE(relative_error(state.pool(StateKind::kDelta), delta), kDeltaNetBound) << "rank " << r;
    const at::Tensor conv = state_->pool(StateKind::kConv);
    const int64_t keys = local.num_k_heads * 16;
    const at::Tensor channels =
        at::cat({conv.narrow(2, key_begin * 16, keys), conv.narrow(2, 32 + key_begin * 16, keys),
                 conv.narrow(2, 64 + value_begin * 32, local.num_v_heads * 32)},
                2);
    EXPECT_LE(relative_error(state.pool(StateKind::kConv), channels), kDeltaNetBound) << "rank " << r;
  }
  EXPECT_LE(relative_error(first, out_.first), kDeltaNetBound);
  EXPECT_LE(relative_error(second, out_.second), kDeltaNetBound);
}

/// The ranks are threads; each adds its tensor, all wait, each takes the sum.
class ThreadGroup : public AllReduce {
 public:
  explicit ThreadGroup(int64_t world) : added_(world), taken_(world, Clear{this}) {}

  void sum(at::Tensor& tensor) override {
    {
      const std::lock_guard lock(mutex_);
      ++num_calls_;
      total_ = total_.defined() ? total_ + tensor : tensor.clone();
    }
    added_.arrive_and_wait();
    tensor.copy_(total_);
    taken_.arrive_and_wait();
  }
  int64_t num_calls() const { return num_calls_; }

 private:
  struct Clear {
    ThreadGroup* group;
    void operator()() noexcept { group->total_ = at::Tensor(); }
  };

  std::mutex mutex_;
  std::barrier<> added_;
  std::barrier<Clear> taken_;
  at::Tensor total_;
  int64_t num_calls_ = 0;
};

TEST_P(ShardTest, TheGroupIsAskedOnceAForward) {
  const int64_t world = GetParam();
  const auto group = std::make_shared<ThreadGroup>(world);
  std::vector<TwoSteps> outs(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < world; ++r) {
    threads.emplace_back([&, r] {
      const Qwen3GatedDeltaNet layer = rank(r, group);
      GdnState state = make_state(layer, 2);
      outs[r] = run_two_steps(layer, state, x_);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(group->num_calls(), 2 * world);
  for (const TwoSteps& out : outs) {
    EXPECT_LE(relative_error(out.first, out_.first), kDeltaNetBound);
    EXPECT_LE(relative_error(out.second, out_.second), kDeltaNetBound);
    EXPECT_TRUE(same_bits(out.first, outs[0].first)) << "the ranks disagree";
  }
}

TEST_P(ShardTest, RoundedRowsAndColumnsAreCutBetweenTheirGroups) {
  const TensorMap separate(weights_), fused(interleaved(weights_, config_));
  constexpr auto kFormat = kernel::WeightFormat::kInt4;
  const RoundedWeights rounded(separate, kFormat), fused_rounded(fused, kFormat);
  const Qwen3GatedDeltaNet whole(config_, rounded, kPrefix, at::kFloat);
  GdnState state = make_state(whole, 2);
  const TwoSteps want = run_two_steps(whole, state, x_);
  EXPECT_GT(relative_error(want.first, out_.first), 1e-2) << "nothing was rounded";

  for (const RoundedWeights* weights : {&rounded, &fused_rounded}) {
    at::Tensor first = at::zeros_like(want.first), second = at::zeros_like(want.second);
    for (int64_t r = 0; r < GetParam(); ++r) {
      const Shard shard{.rank = r, .world = GetParam()};
      const Qwen3GatedDeltaNet layer(config_, *weights, kPrefix, at::kFloat, shard);
      GdnState of_rank = make_state(layer, 2);
      const TwoSteps partial = run_two_steps(layer, of_rank, x_);
      first += partial.first;
      second += partial.second;
    }
    EXPECT_LE(relative_error(first, want.first), kRoundedBound);
    EXPECT_LE(relative_error(second, want.second), kRoundedBound);
  }
}

TEST(Qwen3GatedDeltaNet, RefusesShardsThatCutThroughGroups) {
  const GdnConfig config = small();  // out_proj has 256 columns
  const TensorMap plain(gdn_weights(config));
  const RoundedWeights rounded(plain, kernel::WeightFormat::kInt8);
  const auto build = [&](int64_t world) {
    return [&, world] { Qwen3GatedDeltaNet(config, rounded, kPrefix, at::kFloat, {.rank = 1, .world = world}); };
  };
  build(4)();
  expect_error<UnsupportedError>(build(8), {"columns", "groups of 64", "got 32 to 64"});
}

TEST(Qwen3GatedDeltaNet, SaysWhichStateItNeeds) {
  GdnConfig config = small();
  config.max_draft_tokens = 3;
  config.state_dtype = at::kBFloat16;
  const Qwen3GatedDeltaNet layer(config, TensorMap(gdn_weights(config)), kPrefix, at::kHalf);
  const std::vector<StateSpec> specs = layer.state_specs();
  ASSERT_EQ(specs.size(), 2u);
  EXPECT_EQ(specs[0].kind, StateKind::kConv);
  EXPECT_EQ(specs[0].slot_shape, (std::vector<int64_t>{3 + 3, 2 * 32 + 256}));
  EXPECT_EQ(specs[0].dtype, at::kHalf);
  EXPECT_EQ(specs[1].kind, StateKind::kDelta);
  EXPECT_EQ(specs[1].slot_shape, (std::vector<int64_t>{8, 32, 16}));
  EXPECT_EQ(specs[1].dtype, at::kBFloat16);
}

TEST(Qwen3GatedDeltaNet, RefusesShardsThatDoNotDivide) {
  const GdnConfig config = small();  // H = 2, HV = 8
  const Weights weights = gdn_weights(config);
  const auto build = [&](int64_t rank, int64_t world) {
    return [&, rank, world] {
      Qwen3GatedDeltaNet(config, TensorMap(weights), kPrefix, at::kFloat, {.rank = rank, .world = world});
    };
  };
  expect_error<ShapeError>(build(0, 3), {"shard", "num_v_heads=8", "num_k_heads=2", "got 3"});
  expect_error<ShapeError>(build(0, 16), {"shard", "got 16"});
  expect_error<ShapeError>(build(2, 2), {"shard", "rank 2 of 2"});
  expect_error<ShapeError>(build(-1, 2), {"shard", "rank -1 of 2"});
  expect_error<ShapeError>(build(0, 0), {"shard", "of 0"});

  GdnConfig odd = config;
  odd.num_k_heads = 3;  // 8 value heads
  expect_error<ShapeError>([&] { Qwen3GatedDeltaNet(odd, TensorMap(weights), kPrefix, at::kFloat); },
                           {"num_v_heads", "multiple of num_k_heads=3", "got 8"});
  odd.num_k_heads = 2;
  odd.num_v_heads = 0;
  expect_error<ShapeError>([&] { Qwen3GatedDeltaNet(odd, TensorMap(weights), kPrefix, at::kFloat); },
                           {"num_v_heads", "got 0"});
  // H = 4, HV = 12: a world of 6 divides the value heads and cuts through key heads.
  odd.num_k_heads = 4;
  odd.num_v_heads = 12;
  expect_error<ShapeError>(
      [&] { Qwen3GatedDeltaNet(odd, TensorMap(weights), kPrefix, at::kFloat, {.rank = 0, .world = 6}); },
      {"shard", "got 6"});
}

TEST(Qwen3GatedDeltaNet, RefusesMissingAndMisshapenWeights) {
  const GdnConfig config = small();
  const Weights separate = gdn_weights(config);
  for (const Weights& weights : {separate, interleaved(separate, config)}) {
    for (const auto& [name, tensor] : weights) {
      Weights without = weights;
      without.erase(name);
      // Without the fused projection the separate ones are looked for.
      const std::string missing = name.ends_with("in_proj_qkvz.weight") ? "in_proj_qkv.weight" : name;
      expect_error<CheckpointError>([&] { Qwen3GatedDeltaNet(config, TensorMap(without), kPrefix, at::kFloat); },
                                    {missing});
      Weights larger = weights;
      std::vector<int64_t> shape = tensor.sizes().vec();
      ++shape[0];
      larger[name] = at::zeros(shape);
      expect_error<CheckpointError>([&] { Qwen3GatedDeltaNet(config, TensorMap(larger), kPrefix, at::kFloat); },
                                    {name, "expected"});
    }
  }
}

TEST(Qwen3GatedDeltaNet, RefusesSegmentsThatDoNotCoverTheTokens) {
  const GdnConfig config = small();
  const Qwen3GatedDeltaNet layer(config, TensorMap(gdn_weights(config)), kPrefix, at::kFloat);
  GdnState state = make_state(layer, 3);
  const at::Tensor x = RandomTensors(1).normal({4, 32});
  const auto forward = [&](std::vector<Segment> segments) {
    return [&, segments] { layer.forward(x, batch_of(segments), state); };
  };
  expect_error<ShapeError>(forward({decode(0, {0, 1, 2})}), {"hidden", "T=3", "[4, 32]"});
  expect_error<ShapeError>(forward({decode(0, {0}), prefill(2, {3}, {1}, {false})}), {"segments", "token 1", "got 2"});
  expect_error<ShapeError>([&] { layer.forward(x.flatten(), batch_of({decode(0, {0})}), state); }, {"hidden", "[128]"});
  EXPECT_NO_THROW(forward({prefill(0, {4}, {1}, {false})})());
}

}  // namespace
}  // namespace xgdn::testing
