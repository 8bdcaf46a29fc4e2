// SPDX-License-Identifier: Apache-2.0
// The full-attention layer against its formulas in double, with a cache whose other rows are NaN.
#include "core/layers/gated_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_weights.h"

namespace xgdn::testing {
namespace {

constexpr double kAttentionBound = 1e-5;  // f32, sums of up to 100 terms
constexpr double kPartialRotary = 0.25;
constexpr double kTheta = 10000.0;
constexpr int64_t kBlockSize = 8;

const AttentionConfig kConfig{.hidden_size = 48, .num_heads = 6, .num_kv_heads = 2, .head_dim = 16, .bias = true};

Weights attention_weights() {
  RandomTensors random(3);
  const int64_t query_dim = kConfig.num_heads * kConfig.head_dim;
  const int64_t kv_dim = kConfig.num_kv_heads * kConfig.head_dim;
  return {{"q_proj.weight", random.projection(2 * query_dim, kConfig.hidden_size)},
          {"q_proj.bias", random.normal({2 * query_dim})},
          {"k_proj.weight", random.projection(kv_dim, kConfig.hidden_size)},
          {"k_proj.bias", random.normal({kv_dim})},
          {"v_proj.weight", random.projection(kv_dim, kConfig.hidden_size)},
          {"v_proj.bias", random.normal({kv_dim})},
          {"o_proj.weight", random.projection(kConfig.hidden_size, query_dim)},
          {"o_proj.bias", random.normal({kConfig.hidden_size})},
          {"q_norm.weight", random.normal({kConfig.head_dim}, 0.2)},
          {"k_norm.weight", random.normal({kConfig.head_dim}, 0.2)}};
}

/// One sequence from its first token on, in double: [T, hidden].
at::Tensor truth(const Weights& weights, const at::Tensor& hidden) {
  const auto w = [&](const std::string& name) { return weights.at(name).to(at::kDouble); };
  const int64_t T = hidden.size(0);
  const int64_t D = kConfig.head_dim;
  const auto project = [&](const std::string& name, const at::Tensor& x) {
    return at::linear(x, w(name + ".weight"), w(name + ".bias"));
  };
  const auto norm = [&](const at::Tensor& x, const std::string& name) {
    return x / (x.square().mean(-1, true) + kConfig.rms_norm_eps).sqrt() * (1.0 + w(name));
  };
  const int64_t half = static_cast<int64_t>(D * kPartialRotary) / 2;
  const at::Tensor frequencies = at::pow(kTheta, -at::arange(half, at::kDouble) / half);
  const at::Tensor angles = (at::arange(T, at::kDouble).unsqueeze(1) * frequencies).unsqueeze(1);  // [T, 1, half]
  const auto rotate = [&](const at::Tensor& x) {
    const at::Tensor low = x.narrow(-1, 0, half);
    const at::Tensor high = x.narrow(-1, half, half);
    return at::cat({low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin(),
                    x.narrow(-1, 2 * half, D - 2 * half)},
                   -1);
  };
  const at::Tensor x = hidden.to(at::kDouble);
  const at::Tensor query_gate = project("q_proj", x).view({T, kConfig.num_heads, 2 * D});
  const int64_t ratio = kConfig.num_heads / kConfig.num_kv_heads;
  const auto kv_heads = [&](const at::Tensor& t) { return t.repeat_interleave(ratio, 1).transpose(0, 1); };
  const at::Tensor q = rotate(norm(query_gate.narrow(-1, 0, D), "q_norm.weight")).transpose(0, 1);
  const at::Tensor k = kv_heads(rotate(norm(project("k_proj", x).view({T, -1, D}), "k_norm.weight")));
  const at::Tensor v = kv_heads(project("v_proj", x).view({T, -1, D}));
  const at::Tensor scores = at::matmul(q, k.transpose(1, 2)) / std::sqrt(static_cast<double>(D));
  const at::Tensor is_future = at::ones({T, T}, at::kBool).triu(1);
  const at::Tensor shares = at::softmax(scores.masked_fill(is_future, -1e300), -1);
  const at::Tensor o = at::matmul(shares, v).transpose(0, 1) * at::sigmoid(query_gate.narrow(-1, D, D));
  return project("o_proj", o.flatten(1));
}

/// Tokens [begin, begin + count) of a sequence that owns `blocks`.
struct Piece {
  int64_t begin, count;
  std::vector<int32_t> blocks;
};

class GatedAttentionTest : public ::testing::Test {
 protected:
  GatedAttentionTest()
      : weights_(attention_weights()),
        layer_(kConfig, TensorMap(weights_), "", at::kFloat),
        kv_{at::full({20, kBlockSize, 2, 16}, kNaN), at::full({20, kBlockSize, 2, 16}, kNaN)} {}

  /// One forward over pieces of several sequences; notes the rows it may write.
  at::Tensor forward(const std::vector<at::Tensor>& hidden, const std::vector<Piece>& pieces) {
    return forward(layer_, kv_, hidden, pieces);
  }
  at::Tensor forward(const GatedAttention& layer, KvPool& kv, const std::vector<at::Tensor>& hidden,
                     const std::vector<Piece>& pieces) {
    size_t columns = 0;
    for (const Piece& piece : pieces) columns = std::max(columns, piece.blocks.size());
    std::vector<int32_t> positions, rows, blocks, context_lens, cu_seqlens{0};
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Piece& piece = pieces[i];
      inputs.push_back(hidden[i].narrow(0, piece.begin, piece.count));
      context_lens.push_back(static_cast<int32_t>(piece.begin + piece.count));
      cu_seqlens.push_back(static_cast<int32_t>(cu_seqlens.back() + piece.count));
      for (int64_t t = piece.begin; t < piece.begin + piece.count; ++t) {
        positions.push_back(static_cast<int32_t>(t));
        rows.push_back(static_cast<int32_t>(piece.blocks[t / kBlockSize] * kBlockSize + t % kBlockSize));
      }
      blocks.insert(blocks.end(), piece.blocks.begin(), piece.blocks.end());
      blocks.resize((i + 1) * columns, -1);
    }
    written_.insert(rows.begin(), rows.end());
    const AttentionBatch batch{.positions = i32(positions),
                               .slot_mapping = i32(rows),
                               .block_table = i32(blocks).view({std::ssize(pieces), -1}),
                               .context_lens = i32(context_lens),
                               .cu_seqlens = i32(cu_seqlens),
                               .host = {.may_have_padding = false}};
    const Rotary rotary(kConfig.head_dim, kPartialRotary, kTheta);
    return layer.forward(at::cat(inputs), rotary.table(batch.positions, at::kFloat), batch, kv);
  }

  void expect_other_rows_nan() const {
    const at::Tensor k = kv_.k.flatten(0, 1), v = kv_.v.flatten(0, 1);
    for (int64_t row = 0; row < k.size(0); ++row) {
      const bool is_written = written_.contains(static_cast<int32_t>(row));
      EXPECT_EQ(at::isfinite(k[row]).all().item<bool>(), is_written) << "key row " << row;
      EXPECT_EQ(at::isfinite(v[row]).all().item<bool>(), is_written) << "value row " << row;
    }
  }

  Weights weights_;
  GatedAttention layer_;
  KvPool kv_;
  std::set<int32_t> written_;
};

TEST_F(GatedAttentionTest, PiecesOfSeveralSequencesAreTheFormula) {
  RandomTensors random(4);
  const std::vector<at::Tensor> x{random.normal({45, 48}), random.normal({20, 48}), random.normal({1, 48})};
  const std::vector<int32_t> first{7, 3, 12, 0, 19, 5}, second{1, 18, 4}, third{9};
  const at::Tensor want[] = {truth(weights_, x[0]), truth(weights_, x[1]), truth(weights_, x[2])};

  const at::Tensor whole = forward(x, {{0, 30, first}, {0, 19, second}, {0, 1, third}});
  EXPECT_LE(relative_error(whole.narrow(0, 0, 30), want[0].narrow(0, 0, 30)), kAttentionBound);
  EXPECT_LE(relative_error(whole.narrow(0, 30, 19), want[1].narrow(0, 0, 19)), kAttentionBound);
  EXPECT_LE(relative_error(whole.narrow(0, 49, 1), want[2]), kAttentionBound);
  expect_other_rows_nan();

  const at::Tensor next = forward({x[1], x[0]}, {{19, 1, second}, {30, 14, first}});
  EXPECT_LE(relative_error(next.narrow(0, 0, 1), want[1].narrow(0, 19, 1)), kAttentionBound);
  EXPECT_LE(relative_error(next.narrow(0, 1, 14), want[0].narrow(0, 30, 14)), kAttentionBound);
  const at::Tensor last = forward({x[0]}, {{44, 1, first}});
  EXPECT_LE(relative_error(last, want[0].narrow(0, 44, 1)), kAttentionBound);
  expect_other_rows_nan();
}

TEST_F(GatedAttentionTest, PartialSumsOfRanksMakeTheWhole) {
  RandomTensors random(6);
  const std::vector<at::Tensor> x{random.normal({30, 48}), random.normal({9, 48})};
  const std::vector<Piece> pieces{{0, 30, {7, 3, 12, 0}}, {0, 9, {1, 18}}};
  const at::Tensor want = at::cat({truth(weights_, x[0]), truth(weights_, x[1])});
  for (const auto& [world, kv_heads] : {std::pair<int64_t, int64_t>{2, 1}, {6, 1}}) {
    at::Tensor sum = at::zeros_like(want);
    for (int64_t rank = 0; rank < world; ++rank) {
      const GatedAttention layer(kConfig, TensorMap(weights_), "", at::kFloat, {}, {.rank = rank, .world = world});
      KvPool kv{at::full({20, kBlockSize, kv_heads, 16}, kNaN), at::full({20, kBlockSize, kv_heads, 16}, kNaN)};
      sum += forward(layer, kv, x, pieces);
    }
    EXPECT_LE(relative_error(sum, want), kAttentionBound) << world << " ranks";
  }
  const auto build = [&](int64_t world) {
    return
        [&, world] { GatedAttention(kConfig, TensorMap(weights_), "", at::kFloat, {}, {.rank = 0, .world = world}); };
  };
  expect_error<ShapeError>(build(4), {"[GatedAttention] shard", "divides num_heads=6", "got 4"});
  expect_error<ShapeError>(build(3), {"divides or is a multiple of num_kv_heads=2", "got 3"});
}

TEST_F(GatedAttentionTest, NaNStaysInItsSequence) {
  RandomTensors random(5);
  const at::Tensor sound = random.normal({20, 48});
  const at::Tensor other = random.normal({20, 48});
  const std::vector<int32_t> first{2, 3, 4}, second{5, 6, 7};
  const at::Tensor want = forward({sound, other}, {{0, 20, first}, {0, 20, second}});
  const at::Tensor broken = other.clone();
  broken[3].fill_(kNaN);
  const at::Tensor got = forward({sound, broken}, {{0, 20, first}, {0, 20, second}});
  EXPECT_LE(relative_error(got.narrow(0, 0, 20), want.narrow(0, 0, 20)), kAttentionBound);
  EXPECT_FALSE(at::isfinite(got.narrow(0, 23, 17)).any().item<bool>());
}

TEST_F(GatedAttentionTest, RefusesACacheThatWasFreed) {
  const at::Tensor x = RandomTensors(5).normal({3, 48});
  for (at::Tensor KvPool::*pool : {&KvPool::k, &KvPool::v}) {
    const at::Tensor whole = kv_.*pool;
    kv_.*pool = whole.clone();
    (kv_.*pool).storage().unsafeGetStorageImpl()->set_nbytes(100);
    expect_error<ShapeError>(
        [&] {
          forward({x}, {{0, 3, {2}}});
        },
        {pool == &KvPool::k ? "k_cache" : "v_cache", "storage of at least", "got one of 100"});
    kv_.*pool = whole;
  }
}

}  // namespace
}  // namespace xgdn::testing
