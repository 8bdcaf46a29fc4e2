// SPDX-License-Identifier: Apache-2.0
// How CUDA's prefill cuts long sequences: for the shapes of the benchmarks, and what holds for all.
#include "core/kernels/cuda/chunk_split.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace xgdn::kernel::cuda {
namespace {

constexpr int64_t kH200 = 132;  // multiprocessors

/// A batch of equal sequences; value heads of 128 x 128.
struct Batch {
  std::string name;
  int64_t value_heads;
  int64_t tokens;
  int64_t sequences;
  int32_t pieces;  // of each

  int64_t blocks() const { return value_heads * 2; }
  int32_t chunks() const { return static_cast<int32_t>((tokens / sequences + 63) / 64); }
};

ChunkSplit split_of(const Batch& b) {
  return choose_split({kH200, b.blocks(), b.sequences, b.chunks()});
}

TEST(ChunkSplit, CutsWhereOneSequenceLeavesMultiprocessorsIdle) {
  const std::vector<Batch> batches = {
      {"16x32 4K x1", 32, 4096, 1, 2},   {"16x32 4K x8", 32, 4096, 8, 1},   {"16x32 16K x1", 32, 16384, 1, 2},
      {"16x32 16K x8", 32, 16384, 8, 1}, {"16x32 64K x1", 32, 65536, 1, 2}, {"16x32 64K x8", 32, 65536, 8, 1},
      {"16x16 16K x1", 16, 16384, 1, 4}, {"4x8 4K x1", 8, 4096, 1, 4},      {"4x8 4K x8", 8, 4096, 8, 1},
      {"4x8 64K x1", 8, 65536, 1, 8},    {"4x8 2K x1", 8, 2048, 1, 2},      {"4x8 1K x1", 8, 1024, 1, 1},
      {"2x4 64K x1", 4, 65536, 1, 16},   {"1x2 64K x1", 2, 65536, 1, 16},   {"1x2 4K x1", 2, 4096, 1, 4},
      {"16x64 64K x1", 64, 65536, 1, 1}, {"16x32 2K x1", 32, 2048, 1, 2},   {"16x32 1K x1", 32, 1024, 1, 1},
      {"4x8 64K x8", 8, 65536, 8, 8},    {"16x32 64K x2", 32, 65536, 2, 1}, {"8x16 8K x2", 16, 8192, 2, 4},
  };
  for (const Batch& b : batches) EXPECT_EQ(split_of(b).pieces(b.chunks()), b.pieces) << b.name;
}

TEST(ChunkSplit, RaggedBatchesOfManyHeadsStayWhole) {
  EXPECT_FALSE(choose_split({kH200, 64, 32, 20}).cuts());
  EXPECT_FALSE(choose_split({kH200, 64, 32, 700}).cuts());
}

TEST(ChunkSplit, JumpsDependOnTheSequenceTheHeadsAndTheDeviceAlone) {
  for (const int64_t blocks : {4, 8, 16, 32}) {
    for (int32_t chunks = 1; chunks < 1200; ++chunks) {
      const ChunkSplit alone = choose_split({kH200, blocks, 1, chunks});
      for (const int64_t sequences : {1, 2, 7, 64}) {
        for (const int64_t longest : {chunks, chunks + 40, 2000}) {
          const ChunkSplit beside = choose_split({kH200, blocks, sequences, longest});
          const int32_t pieces = alone.pieces(chunks);
          if (pieces > 2) {
            ASSERT_EQ(beside.pieces(chunks), pieces);
            ASSERT_EQ(beside.first_chunk(chunks, pieces, 1), alone.first_chunk(chunks, pieces, 1));
          } else {
            ASSERT_LE(beside.pieces(chunks), 2);
          }
        }
      }
    }
  }
}

TEST(ChunkSplit, PiecesFollowEachOtherAndAreNeverShort) {
  for (const int64_t blocks : {4, 8, 16, 32, 64}) {
    const ChunkSplit split = choose_split({kH200, blocks, 1, 3000});
    ASSERT_TRUE(split.cuts());
    for (int32_t chunks = 0; chunks < 3000; ++chunks) {
      const int32_t pieces = split.pieces(chunks);
      ASSERT_GE(pieces, 1);
      ASSERT_LE(pieces, split.max_pieces);
      ASSERT_EQ(split.first_chunk(chunks, pieces, 0), 0);
      ASSERT_EQ(split.first_chunk(chunks, pieces, pieces), chunks);
      if (pieces == 1) continue;
      for (int32_t piece = 0; piece < pieces; ++piece) {
        const int32_t length = split.first_chunk(chunks, pieces, piece + 1) - split.first_chunk(chunks, pieces, piece);
        ASSERT_GE(length, split.jumps() ? kChunksPerJump : kMinChunksAhead / (kLeadAhead + 2));
      }
    }
  }
}

TEST(ChunkSplit, ThereIsRoomForTheCutsOfEveryBatch) {
  std::mt19937 random(0);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> chunks(1 + random() % 40);
    for (int32_t& c : chunks) c = static_cast<int32_t>(random() % (round % 2 == 0 ? 70 : 700));
    const int64_t sum = std::accumulate(chunks.begin(), chunks.end(), int64_t{0});
    const int64_t blocks = int64_t{4} << random() % 5;
    for (const int64_t N : {int64_t{1}, static_cast<int64_t>(chunks.size())}) {
      // What the host may know instead of the longest sequence: their sum.
      const ChunkSplit split = choose_split({kH200, blocks, N, sum});
      int64_t cuts = 0;
      for (const int32_t c : chunks) cuts += split.pieces(c) - 1;
      ASSERT_LE(cuts, split.most_cuts(static_cast<int64_t>(chunks.size()), sum));
      if (split.cuts()) {
        ASSERT_GT(split.most_cuts(static_cast<int64_t>(chunks.size()), sum), 0);
      }
    }
  }
}

}  // namespace
}  // namespace xgdn::kernel::cuda
