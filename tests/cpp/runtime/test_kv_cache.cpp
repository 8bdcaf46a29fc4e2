// SPDX-License-Identifier: Apache-2.0
// Blocks of the KV cache: who holds them and what they weigh.
#include "core/runtime/kv_cache.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

const KvCacheSpec kSpec{.num_layers = 3, .num_kv_heads = 2, .head_dim = 8, .block_size = 16, .dtype = at::kBFloat16};

TEST(KvCache, GivesEveryBlockOnce) {
  KvCache cache(kSpec, 6, c10::kCPU);
  std::set<int32_t> blocks;
  for (int64_t count : {2, 0, 3, 1}) {
    const std::vector<int32_t> got = cache.allocate(count);
    EXPECT_EQ(static_cast<int64_t>(got.size()), count);
    blocks.insert(got.begin(), got.end());
  }
  EXPECT_EQ(blocks, (std::set<int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(cache.num_free(), 0);
}

TEST(KvCache, TakesAllOrNothing) {
  KvCache cache(kSpec, 5, c10::kCPU);
  const std::vector<int32_t> held = cache.allocate(2);
  expect_error<OutOfBlocks>([&] { cache.allocate(4); }, {"[KvCache]", "4 free blocks", "3 of 5"});
  EXPECT_EQ(cache.num_free(), 3);
  EXPECT_EQ(cache.allocate(3).size(), 3u);
  cache.release(held);
  EXPECT_EQ(cache.num_free(), 2);
}

TEST(KvCache, ASharedBlockIsFreedByItsLastHolder) {
  KvCache cache(kSpec, 4, c10::kCPU);
  const std::vector<int32_t> blocks = cache.allocate(3);
  cache.share({blocks[0], blocks[2]});
  EXPECT_EQ(cache.ref_count(blocks[0]), 2);
  EXPECT_EQ(cache.ref_count(blocks[1]), 1);
  cache.release(blocks);
  EXPECT_EQ(cache.ref_count(blocks[0]), 1);
  expect_error<RangeError>([&] { cache.ref_count(blocks[1]); }, {"[KvCache] ref_count", "a held block"});
  EXPECT_EQ(cache.num_free(), 2);  // blocks[1] and the one never taken
  const std::vector<int32_t> others = cache.allocate(2);
  for (int32_t block : others) {
    EXPECT_NE(block, blocks[0]);
    EXPECT_NE(block, blocks[2]);
  }
  cache.release(std::vector{blocks[0], blocks[2]});
  EXPECT_EQ(cache.num_free(), 2);
}

TEST(KvCache, ABlockThatNobodyHoldsCannotBeReleasedOrShared) {
  KvCache cache(kSpec, 3, c10::kCPU);
  const std::vector<int32_t> blocks = cache.allocate(1);
  cache.release(blocks);
  for (int32_t block : {blocks[0], -1, 3}) {
    const std::string name = std::to_string(block);
    expect_error<RangeError>([&] { cache.release(std::vector{block}); }, {"[KvCache] release", "held block", name});
    expect_error<RangeError>([&] { cache.share({block}); }, {"[KvCache] share", "held block", name});
  }
  EXPECT_EQ(cache.num_free(), 3);
  const std::vector<int32_t> all = cache.allocate(3);
  EXPECT_EQ(std::set<int32_t>(all.begin(), all.end()).size(), 3u);
}

TEST(KvCache, RoundsTokensUpToBlocks) {
  KvCache cache(kSpec, 1, c10::kCPU);
  EXPECT_EQ(cache.blocks_for(0), 0);
  EXPECT_EQ(cache.blocks_for(1), 1);
  EXPECT_EQ(cache.blocks_for(16), 1);
  EXPECT_EQ(cache.blocks_for(17), 2);
  KvCacheSpec without_attention = kSpec;
  without_attention.num_layers = 0;
  EXPECT_EQ(KvCache(without_attention, 0, c10::kCPU).blocks_for(1000), 0);
}

TEST(KvCache, CountsItsBytesExactly) {
  KvCache cache(kSpec, 5, c10::kCPU);
  ASSERT_EQ(cache.layers().size(), 3u);
  int64_t bytes = 0;
  for (const KvPool& layer : cache.layers()) {
    EXPECT_EQ(layer.k.sizes(), (std::vector<int64_t>{5, 16, 2, 8}));
    bytes += static_cast<int64_t>(layer.k.nbytes() + layer.v.nbytes());
  }
  EXPECT_EQ(cache.bytes(), bytes);
  EXPECT_EQ(kSpec.block_bytes(), bytes / 5);
}

TEST(KvCache, ARowOfInt8HasItsScaleBehindItsCodes) {
  KvCacheSpec spec = kSpec;
  spec.dtype = at::kChar;
  KvCache cache(spec, 5, c10::kCPU);
  for (const KvPool& layer : cache.layers()) {
    for (const at::Tensor& pool : {layer.k, layer.v}) {
      EXPECT_EQ(pool.sizes(), (std::vector<int64_t>{5, 16, 2, 12}));
      EXPECT_EQ(pool.scalar_type(), at::kChar);
    }
  }
  EXPECT_EQ(spec.block_bytes(), 3 * 2 * 16 * 2 * 12);
  EXPECT_EQ(cache.bytes(), 5 * spec.block_bytes());
}

TEST(KvCache, ImpossibleSizesAreRefused) {
  expect_error<RequestError>([] { KvCache(kSpec, -1, c10::kCPU); }, {"[KvCache] num_blocks", "-1"});
  KvCacheSpec spec = kSpec;
  spec.block_size = 0;
  expect_error<RequestError>([&] { KvCache(spec, 1, c10::kCPU); }, {"[KvCache] block_size", "got 0"});
  // An index of a block is int32, and so is that of a row.
  expect_error<RequestError>([] { KvCache(kSpec, std::numeric_limits<int64_t>::max(), c10::kCPU); },
                             {"[KvCache] num_blocks", "at most 2147483647", "got 9223372036854775807"});
  spec.block_size = int64_t{1} << 31;
  expect_error<RequestError>([&] { KvCache(spec, 1, c10::kMeta); }, {"[KvCache] num_blocks", "at most 0 blocks"});
  KvCache cache(kSpec, 2, c10::kCPU);
  expect_error<RequestError>([&] { cache.allocate(-1); }, {"[KvCache] count", "-1"});
  EXPECT_EQ(cache.num_free(), 2);
}

TEST(KvCache, RestoresTheBitsOfWhatItSaved) {
  KvCache kv({.num_layers = 2, .num_kv_heads = 2, .head_dim = 4, .block_size = 3}, 7, c10::kCPU);
  for (const KvPool& layer : kv.layers()) {
    layer.k.normal_();
    layer.v.normal_();
  }
  const std::vector<int32_t> blocks = kv.allocate(3);
  std::vector<at::Tensor> before;
  for (const KvPool& layer : kv.layers()) {
    for (int32_t block : blocks) before.insert(before.end(), {layer.k[block].clone(), layer.v[block].clone()});
  }
  const std::shared_ptr<const SavedBlocks> saved = kv.save(blocks);
  kv.release(blocks);
  for (const KvPool& layer : kv.layers()) {
    layer.k.fill_(kNaN);
    layer.v.fill_(kNaN);
  }
  kv.allocate(2);
  const std::vector<int32_t> others = kv.allocate(4);
  kv.restore(*saved, {2, 0}, {others[2], others[0]});
  kv.restore(*saved, {1}, {others[1]});
  size_t i = 0;
  for (const KvPool& layer : kv.layers()) {
    for (int which = 0; which < 3; ++which) {
      EXPECT_TRUE(same_bits(layer.k[others[which]], before[i++]));
      EXPECT_TRUE(same_bits(layer.v[others[which]], before[i++]));
    }
    EXPECT_TRUE(layer.k[others[3]].isnan().all().item<bool>()) << "the block beyond was written";
  }
  expect_error<RangeError>([&] { kv.restore(*saved, {0, 1, 2}, {others[0]}); }, {"restore", "3 blocks", "got 1"});
  kv.release(others);
  expect_error<RangeError>([&] { kv.save(others); }, {"save", "held block"});
}

}  // namespace
}  // namespace xgdn::testing
