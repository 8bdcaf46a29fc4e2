// SPDX-License-Identifier: Apache-2.0
// The six tables of vllm-ascend's prefill metadata against plain loops.
#include "chunk_metadata.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

using xgdn::kernel::ChunkMetadata, xgdn::kernel::SequenceIds;
using xllm::kernel::gdn::chunked_prefill_metadata;

/// Rows (i, j) of chunk j of sequence i; i counts only sequences with tokens where `is_compact`.
at::Tensor rows(const std::vector<int64_t>& lengths, int64_t chunk, bool is_compact) {
  std::vector<int64_t> flat;
  int64_t id = 0;
  for (const int64_t length : lengths) {
    for (int64_t begin = 0, j = 0; begin < length; begin += chunk, ++j) flat.insert(flat.end(), {id, j});
    if (length > 0 || !is_compact) ++id;
  }
  return i64(flat).view({-1, 2});
}

/// 0 and the running sum of the chunks of 64, plus `extra` for each sequence.
at::Tensor sums(const std::vector<int64_t>& lengths, int64_t extra) {
  std::vector<int64_t> values{0};
  for (const int64_t length : lengths) values.push_back(values.back() + (length + 63) / 64 + extra);
  return i64(values);
}

void expect_table(const at::Tensor& got, const at::Tensor& want, at::ScalarType type, const char* name) {
  EXPECT_EQ(got.scalar_type(), type) << name;
  EXPECT_EQ(got.device().type(), device().type()) << name;
  EXPECT_TRUE(at::equal(got.cpu().to(at::kLong), want)) << name << "\n" << got.cpu() << "\n" << want;
}

TEST(XllmChunkMetadata, HasBothConventionsOfRows) {
  const std::vector<std::vector<int64_t>> batches{{1}, {64, 65, 0, 1217, 3}, {0, 0, 200}, {1216, 0}, {5000, 0, 130}};
  for (const std::vector<int64_t>& lengths : batches) {
    at::Tensor cu = at::cat({i64({0}), i64(lengths).cumsum(0)});
    for (const at::ScalarType type : {at::kInt, at::kLong}) {
      for (const bool is_compact : {false, true}) {
        const SequenceIds ids = is_compact ? SequenceIds::kCompactRanks : SequenceIds::kTrue;
        const ChunkMetadata m = chunked_prefill_metadata(cu.to(type), 32, 2, ids, device());
        expect_table(m.chunk_indices_chunk64, rows(lengths, 64, is_compact), type, "chunk_indices_chunk64");
        expect_table(m.chunk_indices_large_block, rows(lengths, 1216, is_compact), type, "chunk_indices_large_block");
        // 16 heads a rank: 2^18 / (16 x 64) tokens.
        expect_table(m.block_indices_cumsum, rows(lengths, 256, is_compact), type, "block_indices_cumsum");
        expect_table(m.chunk_offsets_chunk64, sums(lengths, 0), at::kLong, "chunk_offsets_chunk64");
        expect_table(m.update_chunk_offsets_chunk64, sums(lengths, 1), at::kLong, "update_chunk_offsets_chunk64");
        expect_table(m.final_chunk_indices_chunk64, sums(lengths, 1).slice(0, 1) - 1, at::kLong,
                     "final_chunk_indices_chunk64");
      }
    }
  }
}

TEST(XllmChunkMetadata, RoundsTheCumsumBlockUp) {
  const ChunkMetadata m = chunked_prefill_metadata(i32({0, 1025}), 6, 1, SequenceIds::kTrue, device());
  expect_table(m.block_indices_cumsum, rows({1025}, 1024, false), at::kInt, "2^18 / (6 x 64) = 682, to 1024");
}

TEST(XllmChunkMetadata, RefusesWhatItCannotServe) {
  const auto call = [](const at::Tensor& cu, int64_t heads, int64_t ranks) {
    chunked_prefill_metadata(cu, heads, ranks, SequenceIds::kTrue, at::kCPU);
  };
  expect_error<ShapeError>([&] { call(i32({0, 1}), 32, 3); }, {"num_value_heads", "3 ranks", "got 32"});
  expect_error<DtypeError>([&] { call(at::zeros({2}), 32, 1); }, {"cu_seqlens_cpu", "int32 or int64", "Float"});
  expect_error<ShapeError>([&] { call(i32({}), 32, 1); }, {"cu_seqlens_cpu", "[N+1]"});
  expect_error<RangeError>([&] { call(i32({0, 3, 2}), 32, 1); }, {"lengths", "got -1"});
  expect_error<UnsupportedError>([&] { call(i32({0, 1}), 65, 1); }, {"num_v_heads_local", "got 65"});
}

}  // namespace
}  // namespace xgdn::testing
