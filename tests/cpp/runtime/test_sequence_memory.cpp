// SPDX-License-Identifier: Apache-2.0
// What a sequence holds: room, forks, what is empty, swapping; and all of it in random order against a
// pretended model, in which a token's key is a number and a state the fold of the tokens so far.
#include "core/runtime/sequence_memory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

float state_after(const std::vector<float>& tokens) {
  int64_t state = 1;
  for (const float token : tokens) state = (state * 31 + static_cast<int64_t>(token)) % 65521;
  return static_cast<float>(state);
}

// A sequence, and what its memory has to say of it.
struct Told {
  SequenceMemory memory;
  std::vector<float> tokens;
};

class SequenceMemoryTest : public ::testing::Test {
 protected:
  explicit SequenceMemoryTest(int64_t num_blocks = 12, int64_t block_size = 4, int64_t num_slots = 6)
      : states_({{{StateKind::kDelta, {1}, at::kFloat}, {StateKind::kConv, {1}, at::kFloat}}}, num_slots, c10::kCPU,
                /*poison_freed=*/true),
        kv_({.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .block_size = block_size}, num_blocks, c10::kCPU) {}

  Told make() {
    Told told{.memory = SequenceMemory(states_, kv_)};
    told.memory.allocate_state();
    return told;
  }

  /// Computes tokens for which there is room.
  void compute(Told& told, int64_t count) {
    ASSERT_FALSE(told.memory.is_read_by_forks());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = std::ssize(told.tokens);
      const int32_t block = told.memory.blocks().at(position / kv_.block_size());
      EXPECT_EQ(kv_.ref_count(block), 1) << "a shared block is written";
      told.tokens.push_back(static_cast<float>(++num_made_ % 1009));
      *key(told.memory, position) = told.tokens.back();
    }
    for (const SlotGroup group : kSlotGroups) *state(group, told.memory.own_slot(group)) = state_after(told.tokens);
    told.memory.advance(count);
  }

  /// The memory holds what was computed.
  void check(const Told& told) {
    const SequenceMemory& memory = told.memory;
    ASSERT_EQ(memory.num_computed(), std::ssize(told.tokens));
    for (const SlotGroup group : kSlotGroups) {
      if (memory.num_computed() == 0) continue;
      EXPECT_EQ(*state(group, memory.read_slot(group)), state_after(told.tokens));
    }
    if (!memory.is_resident()) return;
    EXPECT_GE(std::ssize(memory.blocks()), kv_.blocks_for(memory.num_computed()));
    for (int64_t i = 0; i < memory.num_computed(); ++i) EXPECT_EQ(*key(memory, i), told.tokens[i]) << "token " << i;
  }

  float* state(SlotGroup group, const StateSlot& slot) {
    const StateKind kind = group == SlotGroup::kCheckpoint ? StateKind::kDelta : StateKind::kConv;
    return states_.layers()[0].pool(kind).mutable_data_ptr<float>() + slot.index();
  }
  float* key(const SequenceMemory& memory, int64_t position) {
    const int64_t row =
        memory.blocks().at(position / kv_.block_size()) * kv_.block_size() + position % kv_.block_size();
    return kv_.layers()[0].k.mutable_data_ptr<float>() + row;
  }

  StatePool states_;
  KvCache kv_;
  int64_t num_made_ = 0;
};

TEST_F(SequenceMemoryTest, AStateSlotIsFreedByItsLastHolder) {
  StateSlot slot(states_, SlotGroup::kCheckpoint);
  EXPECT_EQ(states_.num_free(), 5);
  EXPECT_EQ(states_.num_free(SlotGroup::kRecent), 6);
  {
    const StateSlot other = slot.share();
    EXPECT_TRUE(slot.is_shared());
    EXPECT_EQ(other.index(), slot.index());
  }
  EXPECT_FALSE(slot.is_shared());
  StateSlot moved = std::move(slot);
  EXPECT_FALSE(slot);
  EXPECT_EQ(states_.num_free(), 5);
  moved = StateSlot();
  EXPECT_EQ(states_.num_free(), 6);
}

TEST_F(SequenceMemoryTest, GrowsByWholeBlocksAndTakesAllOrNothing) {
  Told told = make();
  EXPECT_FALSE(told.memory.is_resident());
  EXPECT_EQ(told.memory.num_missing(9), 3);
  told.memory.grow(9);
  EXPECT_TRUE(told.memory.is_resident());
  EXPECT_EQ(told.memory.blocks().size(), 3u);
  EXPECT_EQ(told.memory.num_missing(12), 0);
  told.memory.grow(1);
  EXPECT_EQ(told.memory.blocks().size(), 3u) << "growing never shrinks";
  expect_error<OutOfBlocks>([&] { told.memory.grow(49); }, {"10 free blocks", "9 of 12"});
  EXPECT_EQ(kv_.num_free(), 9);
  told.memory.clear();
  EXPECT_EQ(kv_.num_free(), 12);
  EXPECT_EQ(states_.num_free(), 6);
}

TEST_F(SequenceMemoryTest, AForkSharesFullBlocksAndCopiesTheLast) {
  for (const auto& [num_tokens, num_shared, num_of_fork] :
       std::vector<std::array<int64_t, 3>>{{1, 0, 1}, {4, 1, 1}, {5, 1, 2}, {8, 2, 2}, {11, 2, 3}}) {
    SCOPED_TRACE(num_tokens);
    Told told = make();
    told.memory.grow(num_tokens);
    compute(told, num_tokens);
    Told fork = make();
    fork.memory.grow(0);
    told.memory.fork(fork.memory);
    fork.tokens = told.tokens;
    const std::vector<int32_t>& blocks = told.memory.blocks();
    ASSERT_EQ(std::ssize(fork.memory.blocks()), num_of_fork);
    for (int64_t i = 0; i < std::ssize(blocks); ++i) {
      EXPECT_EQ(fork.memory.blocks()[i] == blocks[i], i < num_shared);
      EXPECT_EQ(kv_.ref_count(blocks[i]), i < num_shared ? 2 : 1);
    }
    EXPECT_EQ(fork.memory.read_slot(SlotGroup::kCheckpoint).index(),
              told.memory.own_slot(SlotGroup::kCheckpoint).index());
    EXPECT_NE(fork.memory.own_slot(SlotGroup::kCheckpoint).index(),
              told.memory.own_slot(SlotGroup::kCheckpoint).index());
    EXPECT_TRUE(told.memory.is_read_by_forks());
    fork.memory.grow(num_tokens + 2);
    compute(fork, 2);
    EXPECT_FALSE(told.memory.is_read_by_forks()) << "it has a state of its own";
    check(told);
    check(fork);
    told.memory.clear();
    check(fork);
  }
  EXPECT_EQ(kv_.num_free(), 12);
}

TEST_F(SequenceMemoryTest, ACheckpointIsWhatTheMemoryGoesOnFrom) {
  for (const auto& [num_tokens, num_room, num_missing] :
       std::vector<std::array<int64_t, 3>>{{4, 4, 0}, {5, 8, 1}, {5, 9, 0}, {8, 20, 0}}) {
    SCOPED_TRACE(num_tokens);
    Told told = make();
    told.memory.grow(num_room);
    compute(told, num_tokens);
    EXPECT_EQ(told.memory.num_missing_to_checkpoint(), num_missing);
    Told kept{.memory = told.memory.checkpoint(), .tokens = told.tokens};
    EXPECT_EQ(kv_.num_free(), 12 - kv_.blocks_for(num_room) - num_missing);
    EXPECT_EQ(std::ssize(kept.memory.blocks()), kv_.blocks_for(num_tokens)) << "empty blocks stay with the other";
    EXPECT_FALSE(told.memory.is_read_by_forks()) << "it need not wait";
    EXPECT_TRUE(told.memory.has_unread_state());
    told.memory.grow(num_tokens + 3);
    compute(told, 3);
    EXPECT_FALSE(told.memory.has_unread_state());
    check(told);
    check(kept);
  }
  EXPECT_EQ(kv_.num_free(), 12);
}

TEST_F(SequenceMemoryTest, ACheckpointThatHasNoRoomChangesNothing) {
  Told told = make();
  told.memory.grow(48);
  compute(told, 46);
  expect_error<OutOfBlocks>([&] { told.memory.checkpoint(); }, {"1 free blocks", "0 of 12"});
  check(told);
  std::vector<Told> others(5);
  for (Told& other : others) other = make();
  told.memory.clear();
  told = make();
  told.memory.grow(8);
  compute(told, 8);
  expect_error<OutOfSlots>([&] { told.memory.checkpoint(); }, {"a free slot", "0 of 6"});
  check(told);
}

TEST_F(SequenceMemoryTest, EmptyBlocksAreReleased) {
  Told told = make();
  told.memory.grow(20);
  compute(told, 9);
  told.memory.release_empty_blocks();
  EXPECT_EQ(told.memory.blocks().size(), 3u) << "room for 20 tokens, and 9 are computed";
  EXPECT_EQ(kv_.num_free(), 12 - 3);
  check(told);
  told.memory.release_empty_blocks();
  EXPECT_EQ(told.memory.blocks().size(), 3u);
  check(told);
}

TEST_F(SequenceMemoryTest, SwappedOutBlocksComeBackOnceForAll) {
  Told told = make();
  told.memory.grow(8);
  compute(told, 8);
  Told fork = make();
  told.memory.fork(fork.memory);
  fork.tokens = told.tokens;
  fork.memory.grow(9);
  EXPECT_EQ(kv_.num_free(), 12 - 3);
  told.memory.swap_out();
  EXPECT_EQ(kv_.num_free(), 12 - 3) << "the fork holds all of its blocks";
  fork.memory.swap_out();
  EXPECT_EQ(kv_.num_free(), 12);
  EXPECT_EQ(fork.memory.read_slot(SlotGroup::kCheckpoint).index(), fork.memory.own_slot(SlotGroup::kCheckpoint).index())
      << "its owner need not wait for it";
  kv_.layers()[0].k.fill_(-1);
  EXPECT_EQ(told.memory.num_missing(8), 2);
  told.memory.grow(8);
  EXPECT_EQ(fork.memory.num_missing(8), 0) << "the other brought them back";
  fork.memory.grow(8);
  EXPECT_EQ(kv_.num_free(), 12 - 2);
  check(told);
  check(fork);
  fork.memory.swap_out();
  told.memory.clear();  // saves what the fork still needs
  kv_.layers()[0].k.fill_(-1);
  fork.memory.grow(9);
  check(fork);
}

TEST_F(SequenceMemoryTest, WithoutAttentionThereIsAStateAlone) {
  KvCache kv({.num_layers = 0}, 0, c10::kCPU);
  SequenceMemory memory(states_, kv), fork(states_, kv);
  memory.allocate_state();
  fork.allocate_state();
  memory.grow(100);
  memory.advance(100);
  memory.fork(fork);
  EXPECT_EQ(fork.num_computed(), 100);
  EXPECT_TRUE(fork.blocks().empty());
  fork.swap_out();
  EXPECT_FALSE(memory.is_read_by_forks());
}

class RandomSequenceMemory : public SequenceMemoryTest {
 protected:
  RandomSequenceMemory() : SequenceMemoryTest(/*num_blocks=*/40, /*block_size=*/3, /*num_slots=*/8) {}

  int64_t draw(int64_t end) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(end)); }  // 0..end-1

  bool has_room(const Told& told, int64_t num_tokens) const {
    return told.memory.num_missing(num_tokens) <= kv_.num_free();
  }

  void act(std::vector<Told>& all) {
    if (all.empty() || (states_.num_free() > 0 && draw(12) == 0)) return all.push_back(make());
    const size_t i = static_cast<size_t>(draw(std::ssize(all)));
    Told& told = all[i];
    const int64_t computed = told.memory.num_computed();
    switch (draw(9)) {
      case 0: {
        if (states_.num_free() == 0) return;
        Told fork = make();
        if (draw(2) == 0 && has_room(fork, 1)) fork.memory.grow(draw(2));
        if (fork.memory.is_resident() && kv_.num_free() == 0) return;  // the last block may need a copy
        told.memory.fork(fork.memory);
        fork.tokens = told.tokens;
        return all.push_back(std::move(fork));
      }
      case 1:
        return told.memory.swap_out();
      case 2:
        return told.memory.release_empty_blocks();
      case 3:
        std::swap(told, all.front());
        if (draw(3) == 0) all.pop_back();
        return;
      case 4: {
        if (!told.memory.is_resident() || told.memory.has_unread_state() || states_.num_free() == 0) return;
        if (told.memory.num_missing_to_checkpoint() > kv_.num_free()) return;
        return all.push_back({.memory = told.memory.checkpoint(), .tokens = told.tokens});
      }
      default: {
        const int64_t count = 1 + draw(5);
        if (!has_room(told, computed + count)) return told.memory.swap_out();
        told.memory.grow(computed + count);
        if (!told.memory.is_read_by_forks()) compute(told, count);
      }
    }
  }

  void check_counts(const std::vector<Told>& all) {
    std::map<int32_t, int64_t> blocks;
    std::array<std::set<int32_t>, kSlotGroups.size()> slots;
    for (const Told& told : all) {
      for (const int32_t block : told.memory.blocks()) ++blocks[block];
      for (size_t i = 0; i < slots.size(); ++i) {
        slots[i].insert({told.memory.own_slot(kSlotGroups[i]).index(), told.memory.read_slot(kSlotGroups[i]).index()});
      }
    }
    for (const auto& [block, count] : blocks) EXPECT_EQ(kv_.ref_count(block), count) << "block " << block;
    EXPECT_EQ(std::ssize(blocks) + kv_.num_free(), kv_.num_blocks());
    for (size_t i = 0; i < slots.size(); ++i) {
      EXPECT_EQ(std::ssize(slots[i]) + states_.num_free(kSlotGroups[i]), states_.num_slots());
    }
  }

  std::mt19937_64 generator_;
};

TEST_F(RandomSequenceMemory, HoldsWhatWasComputedAndNothingElse) {
  for (uint64_t seed = 0; seed < 200 && !HasFailure(); ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    generator_.seed(seed);
    std::vector<Told> all;
    for (int i = 0; i < 300 && !HasFailure(); ++i) {
      act(all);
      for (const Told& told : all) check(told);
      check_counts(all);
    }
    all.clear();
    EXPECT_EQ(kv_.num_free(), kv_.num_blocks());
    for (const SlotGroup group : kSlotGroups) EXPECT_EQ(states_.num_free(group), states_.num_slots());
  }
}

}  // namespace
}  // namespace xgdn::testing
