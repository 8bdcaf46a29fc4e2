// SPDX-License-Identifier: Apache-2.0
// Weights by name: what is copied, what is released, what is refused.
#include "core/layers/weight_source.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_weights.h"

namespace xgdn::testing {
namespace {

class Recording : public TensorMap {
 public:
  using TensorMap::TensorMap;
  void release(const std::string& name) const override { released.push_back(name); }
  mutable std::vector<std::string> released;
};

TEST(WeightSource, WithoutConversionTheWeightAliasesItsSource) {
  const at::Tensor stored = RandomTensors(1).normal({4, 3});
  const Recording source({{"w", stored}});
  EXPECT_TRUE(load_weight(source, "w", {4, 3}, at::kFloat).is_alias_of(stored));
  EXPECT_TRUE(source.released.empty()) << "an aliased weight must stay";
  EXPECT_TRUE(same_bits(load_weight(source, "w", {4, 3}, at::kBFloat16), stored.to(at::kBFloat16)));
  EXPECT_EQ(source.released, std::vector<std::string>{"w"});
}

class MappedRecording : public Recording {
 public:
  using Recording::Recording;
  bool is_mapped() const override { return true; }
};

TEST(WeightSource, MappedWeightsAreCopiedAndReleased) {
  const at::Tensor stored = RandomTensors(1).normal({4, 3});
  const MappedRecording source({{"w", stored}});
  const at::Tensor loaded = load_weight(source, "w", {4, 3}, at::kFloat);
  EXPECT_FALSE(loaded.is_alias_of(stored));
  EXPECT_TRUE(same_bits(loaded, stored));
  EXPECT_EQ(source.released, std::vector<std::string>{"w"});
}

TEST(WeightSource, LargeMappedWeightsAreReleasedPieceByPiece) {
  constexpr int64_t kRows = 81, kBytesOfRow = 1 << 20;  // 32 MiB a piece, and a remainder
  const at::Tensor stored = RandomTensors(3).normal({kRows, kBytesOfRow / 4});
  const MappedRecording source({{"w", stored}});
  EXPECT_TRUE(same_bits(load_weight(source, "w", stored.sizes(), at::kFloat), stored));
  EXPECT_EQ(source.released, (std::vector<std::string>{"w", "w", "w"}));
}

TEST(WeightSource, FusedRowsAreCopiesAndTheirSourcesAreReleased) {
  RandomTensors random(2);
  const at::Tensor a = random.normal({4, 3}), b = random.normal({2, 3});
  const Recording source({{"a", a}, {"b", b}});
  const at::Tensor fused =
      fuse_rows(source, {{"b", b}, {"a", a.narrow(0, 1, 2)}, {"a", a.narrow(0, 0, 1)}}, at::kFloat);
  EXPECT_TRUE(same_bits(fused.narrow(0, 0, 2), b));
  EXPECT_TRUE(same_bits(fused.narrow(0, 2, 2), a.narrow(0, 1, 2)));
  EXPECT_TRUE(same_bits(fused.narrow(0, 4, 1), a.narrow(0, 0, 1)));
  EXPECT_FALSE(fused.is_alias_of(a));
  EXPECT_EQ(source.released, (std::vector<std::string>{"b", "a", "a"}));
}

TEST(WeightSource, MissingAndMisshapenNamesAreRefused) {
  const TensorMap source({{"w", RandomTensors(1).normal({4, 3})}});
  EXPECT_TRUE(source.contains("w"));
  EXPECT_FALSE(source.contains("v"));
  expect_error<CheckpointError>([&] { source.get("v", {1}); }, {"v", "got none"});
  expect_error<CheckpointError>([&] { source.get("w", {3, 4}); }, {"w", "[3, 4]", "[4, 3]"});
}

}  // namespace
}  // namespace xgdn::testing
