// SPDX-License-Identifier: Apache-2.0
// The ops through ops_api, without Python: every backend against the recurrence in double.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Device.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "core/errors.h"
#include "core/kernels/ops_api.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/delta_rule.h"

namespace xgdn::testing {
namespace {

// A dtype with the bound of its results: f32 sums of up to 256 terms; bf16 rounds a result by up to 2^-9.
struct Precision {
  const char* name;
  at::ScalarType dtype;
  at::ScalarType state;
  double bound;
};
const Precision kPrecisions[] = {{"f32", at::kFloat, at::kFloat, 1e-6},
                                 {"bf16", at::kBFloat16, at::kFloat, 4e-3},
                                 {"bf16_state", at::kBFloat16, at::kBFloat16, 4e-3}};
void PrintTo(const Precision& p, std::ostream* out) {
  *out << p.name;
}

const Case kPrefillCases[] = {{.lengths = {1}},
                              {.lengths = {63, 0, 64, 65}},
                              {.lengths = {129}, .H = 2, .HV = 6, .K = 48, .V = 32},
                              {.lengths = {70}, .H = 1, .HV = 1, .K = 128, .V = 256},
                              {.lengths = {130}, .lowest_gate = -50}};
const Case kDecodeCases[] = {{.lengths = {1, 1, 1}},
                             {.lengths = {1, 0, 4, 2}},
                             {.lengths = {1, 1}, .H = 2, .HV = 6, .K = 48, .V = 32},
                             {.lengths = {1}, .H = 1, .HV = 1, .K = 256, .V = 128},
                             {.lengths = {1, 3}, .lowest_gate = -50}};

// Backends of this build that serve every op on CPU tensors.
std::vector<std::string> backends_for_cpu_tensors() {
  std::vector<std::string> names = kernel::available_backends();
  for (const kernel::BackendReport& row : kernel::doctor()) {
    if (row.why_not) names.erase(std::remove(names.begin(), names.end(), row.backend), names.end());
  }
  return names;
}

using Run = std::tuple<std::string, Precision, Case>;

class DeltaRuleTest : public ::testing::TestWithParam<Run> {
 protected:
  void expect_right(const DeltaRule& x) {
    const auto [o, S, terms] = x.truth();
    const double bound = std::get<1>(GetParam()).bound;
    EXPECT_LE(relative_error(x.out, o), bound);
    EXPECT_LE(relative_error(x.final_states(), S), bound);
    EXPECT_TRUE(x.other_slots_untouched());
    // Each head and the last token of each sequence by themselves: neither may hide in the whole. What a token reads
    // may be next to nothing, if its q meets no k, and is as exact as what was added.
    for (int64_t h = 0; h < x.c.HV; ++h) EXPECT_LE(relative_error(x.out.select(1, h), o.select(1, h)), 5 * bound);
    int64_t end = 0;
    for (int64_t length : x.c.lengths) {
      end += length;
      if (length == 0) continue;
      EXPECT_LE(relative_error(x.out[end - 1], o[end - 1], terms[end - 1]), bound) << "token " << end - 1;
    }
  }
};

class PrefillTest : public DeltaRuleTest {};
class DecodeTest : public DeltaRuleTest {};

TEST_P(PrefillTest, MatchesTheRecurrence) {
  const auto& [backend, precision, which] = GetParam();
  DeltaRule x(which, precision.dtype, precision.state);
  const kernel::ChunkMetadata chunk = kernel::build_chunk_metadata(which.lengths, which.HV);
  kernel::chunk_gated_delta_rule({.q = x.q,
                                  .k = x.k,
                                  .v = x.v,
                                  .g = x.g,
                                  .beta = x.beta,
                                  .state = x.state,
                                  .cu_seqlens = x.cu_seqlens,
                                  .state_indices = x.slots,
                                  .chunk_indices = chunk.chunk_indices_chunk64,
                                  .chunk_offsets = chunk.chunk_offsets_chunk64,
                                  .out = x.out,
                                  .backend = backend});
  EXPECT_EQ(kernel::last_backend("chunk_gated_delta_rule"), backend);
  expect_right(x);
}

TEST_P(DecodeTest, MatchesTheRecurrence) {
  const auto& [backend, precision, which] = GetParam();
  DeltaRule x(which, precision.dtype, precision.state);
  kernel::recurrent_gated_delta_rule({.q = x.q,
                                      .k = x.k,
                                      .v = x.v,
                                      .g = x.g,
                                      .beta = x.beta,
                                      .state = x.state,
                                      .cu_seqlens = x.cu_seqlens,
                                      .state_indices = x.slots,
                                      .out = x.out,
                                      .backend = backend});
  EXPECT_EQ(kernel::last_backend("recurrent_gated_delta_rule"), backend);
  expect_right(x);
}

std::string run_name(const ::testing::TestParamInfo<Run>& info) {
  return std::get<0>(info.param) + "_" + std::get<1>(info.param).name + "_" + std::to_string(info.index);
}

using ::testing::Combine;
using ::testing::ValuesIn;
INSTANTIATE_TEST_SUITE_P(Backends, PrefillTest,
                         Combine(ValuesIn(backends_for_cpu_tensors()), ValuesIn(kPrecisions), ValuesIn(kPrefillCases)),
                         run_name);
INSTANTIATE_TEST_SUITE_P(Backends, DecodeTest,
                         Combine(ValuesIn(backends_for_cpu_tensors()), ValuesIn(kPrecisions), ValuesIn(kDecodeCases)),
                         run_name);

class BackendTest : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Backends, BackendTest, ValuesIn(backends_for_cpu_tensors()),
                         [](const auto& info) { return info.param; });

// One token for the first and the last slot of a pool with more than 2^31 elements. Only the pages that are touched
// exist, so the pool costs address space and next to no memory.
TEST_P(BackendTest, PoolBeyondTheRangeOf32Bits) {
  constexpr int64_t kDim = 64;
  const int64_t last = (int64_t{1} << 31) / (kDim * kDim) + 1;
  DeltaRule x({.lengths = {1, 1}, .H = 1, .HV = 1, .K = kDim, .V = kDim}, at::kBFloat16, at::kBFloat16);
  const at::Tensor pool = at::empty({last + 1, 1, kDim, kDim}, at::kBFloat16);
  ASSERT_GT(pool.numel(), int64_t{1} << 31);
  pool[0].copy_(x.before[1]);
  pool[last].copy_(x.before[2]);
  kernel::recurrent_gated_delta_rule({.q = x.q,
                                      .k = x.k,
                                      .v = x.v,
                                      .g = x.g,
                                      .beta = x.beta,
                                      .state = pool,
                                      .cu_seqlens = x.cu_seqlens,
                                      .state_indices = i32({0, static_cast<int32_t>(last)}),
                                      .out = x.out,
                                      .backend = GetParam()});
  const auto [o, S, terms] = x.truth();
  EXPECT_LE(relative_error(x.out, o), 4e-3);
  EXPECT_LE(relative_error(pool[0], S[0]), 4e-3);
  EXPECT_LE(relative_error(pool[last], S[1]), 4e-3);
}

TEST_P(BackendTest, PackedDecodeEqualsItsParts) {
  constexpr int64_t N = 3, H = 2, HV = 4, K = 32, V = 48;
  const at::Tensor mixed = at::randn({N, 2 * H * K + HV * V});
  const at::Tensor a = at::randn({N, HV}), b = at::randn({N, HV}), A_log = at::randn({HV}), dt_bias = at::randn({HV});
  const at::Tensor g = at::empty({N, HV}), beta = at::empty({N, HV});
  kernel::gdn_gating({.a = a, .b = b, .A_log = A_log, .dt_bias = dt_bias, .g = g, .beta = beta, .backend = GetParam()});
  const at::Tensor state = at::randn({N + 1, HV, V, K}), packed_state = state.clone();
  const at::Tensor out = at::full({N, HV, V}, kNaN), packed_out = out.clone();
  const at::Tensor slots = i32({2, 0, 3});
  kernel::recurrent_gated_delta_rule({.q = mixed.narrow(1, 0, H * K).unflatten(1, {H, K}),
                                      .k = mixed.narrow(1, H * K, H * K).unflatten(1, {H, K}),
                                      .v = mixed.narrow(1, 2 * H * K, HV * V).unflatten(1, {HV, V}),
                                      .g = g,
                                      .beta = beta,
                                      .state = state,
                                      .cu_seqlens = i32({0, 1, 2, 3}),
                                      .state_indices = slots,
                                      .out = out,
                                      .backend = GetParam()});
  kernel::packed_decode({.mixed_qkv = mixed,
                         .a = a,
                         .b = b,
                         .A_log = A_log,
                         .dt_bias = dt_bias,
                         .state = packed_state,
                         .state_indices = slots,
                         .out = packed_out,
                         .backend = GetParam()});
  EXPECT_LE(relative_error(packed_out, out), 1e-6);
  EXPECT_LE(relative_error(packed_state, state), 1e-6);
}

TEST(Errors, AreTyped) {
  const at::Tensor x = at::randn({2, 3, 16}), out = at::empty_like(x);
  EXPECT_THROW(kernel::l2_norm({.x = x, .out = at::empty({2, 3, 8})}), ShapeError);
  EXPECT_THROW(kernel::l2_norm({.x = x, .out = out.to(at::kHalf)}), DtypeError);
  EXPECT_THROW(kernel::l2_norm({.x = x, .out = at::empty({2, 3, 16}, at::TensorOptions(at::kMeta))}), DeviceError);
  EXPECT_THROW(kernel::l2_norm({.x = x, .out = out, .backend = "abacus"}), UnsupportedError);
  DeltaRule d({.lengths = {1}}, at::kFloat, at::kFloat);
  kernel::ChunkGatedDeltaRuleParams p{.q = d.q,
                                      .k = d.k,
                                      .v = d.v,
                                      .g = d.g,
                                      .beta = d.beta,
                                      .state = d.state,
                                      .cu_seqlens = d.cu_seqlens,
                                      .state_indices = d.slots,
                                      .chunk_indices = {},
                                      .chunk_offsets = {},
                                      .out = d.out};
  EXPECT_THROW(kernel::chunk_gated_delta_rule(p), MissingMetadataError);
  p.chunk_indices = i32({0, 0}).view({1, 2});
  p.chunk_offsets = i32({0, 1});
  p.state_indices = i32({7});
  EXPECT_THROW(kernel::check_indices(p), RangeError);
}

TEST(Errors, NobodyAbleListsEveryBackendsSentence) {
  const at::Tensor x = at::empty({2, 3, 16}, at::TensorOptions(at::kMeta));
  try {
    kernel::l2_norm({.x = x, .out = at::empty_like(x)});
    FAIL() << "expected UnsupportedError";
  } catch (const UnsupportedError& e) {
    const std::string message = e.what();
    EXPECT_NE(message.find("[l2_norm] no backend can serve this call"), std::string::npos) << message;
    for (const char* name : {"cpu: ", "reference: ", "cuda: ", "npu: "}) {
      EXPECT_NE(message.find(name), std::string::npos) << name << "is missing in: " << message;
    }
  }
}

TEST(Errors, TheAscendOpByNameNeedsItsBackend) {
  DeltaRule x({.lengths = {1}}, at::kFloat, at::kFloat);
  EXPECT_THROW(kernel::npu_recurrent_gated_delta_rule({.q = x.q,
                                                       .k = x.k,
                                                       .v = x.v,
                                                       .g = x.g,
                                                       .beta = x.beta,
                                                       .state = x.state,
                                                       .cu_seqlens = x.cu_seqlens,
                                                       .state_indices = x.slots,
                                                       .out = x.out}),
               UnsupportedError);
}

TEST(ChunkMetadata, WorkedValues) {
  const kernel::ChunkMetadata m = kernel::build_chunk_metadata({130, 64, 1, 1300}, 8);
  EXPECT_TRUE(at::equal(m.chunk_offsets_chunk64, i32({0, 3, 4, 5, 26})));
  EXPECT_TRUE(at::equal(m.update_chunk_offsets_chunk64, i32({0, 4, 6, 8, 30})));
  EXPECT_TRUE(at::equal(m.final_chunk_indices_chunk64, i32({3, 5, 7, 29})));
  EXPECT_TRUE(at::equal(m.chunk_indices_large_block, i32({0, 0, 1, 0, 2, 0, 3, 0, 3, 1}).view({5, 2})));
  EXPECT_EQ(kernel::cumsum_block(8), 512);
  EXPECT_THROW(kernel::cumsum_block(65), UnsupportedError);
  // One arena holds them all, so that one copy moves them.
  EXPECT_TRUE(m.chunk_indices_chunk64.is_alias_of(m.block_indices_cumsum));
}

}  // namespace
}  // namespace xgdn::testing
