// SPDX-License-Identifier: Apache-2.0
// Who runs in a step: admission, pieces of prompts, what is freed.
#include "core/runtime/scheduler.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

using Piece = std::pair<RequestId, int64_t>;

class SchedulerTest : public ::testing::Test {
 protected:
  void make(int64_t max_tokens_per_step, int64_t num_slots, int64_t num_blocks, int64_t num_attention_layers = 1) {
    scheduler_.reset();  // its sequences hold what the pools have
    states_ = std::make_unique<StatePool>(kLayers, num_slots, c10::kCPU);
    kv_ = std::make_unique<KvCache>(
        KvCacheSpec{.num_layers = num_attention_layers, .num_kv_heads = 1, .head_dim = 1, .block_size = 16}, num_blocks,
        c10::kCPU);
    scheduler_ =
        std::make_unique<Scheduler>(SchedulerOptions{.max_tokens_per_step = max_tokens_per_step}, *states_, *kv_);
  }

  void add(RequestId id, int64_t prompt_size, int64_t max_new_tokens = 1) {
    const Request request{.prompt = std::vector<int32_t>(static_cast<size_t>(prompt_size), 1),
                          .max_new_tokens = max_new_tokens};
    auto sequence = std::make_unique<Sequence>(id, std::make_shared<const Request>(request));
    sequences_[id] = sequence.get();
    scheduler_->add(std::move(sequence));
  }

  /// Schedules a step and books it as computed, without the drafts.
  std::vector<Piece> step() {
    std::vector<Piece> pieces;
    last_ = scheduler_->schedule();
    for (const ScheduledStep& step : last_) {
      Sequence& sequence = *step.sequence;
      EXPECT_TRUE(sequence.memory.own_slot(SlotGroup::kCheckpoint));
      const bool is_prefill = sequence.num_computed() < sequence.prompt_size();
      EXPECT_EQ(step.kind, is_prefill            ? SegmentKind::kPrefill
                           : step.num_drafts > 0 ? SegmentKind::kVerify
                                                 : SegmentKind::kDecode);
      EXPECT_EQ(step.num_drafts, sequence.num_drafts());
      sequence.memory.advance(step.num_tokens);
      sequence.drafts.clear();
      if (sequence.num_computed() == sequence.num_tokens()) sequence.tokens.push_back(2);
      pieces.emplace_back(sequence.id, step.num_tokens);
    }
    return pieces;
  }

  const std::vector<std::vector<StateSpec>> kLayers{{{StateKind::kDelta, {1, 1, 1}, at::kFloat}}};
  std::unique_ptr<StatePool> states_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<RequestId, Sequence*> sequences_;  // of add()
  std::vector<ScheduledStep> last_;           // of step()
};

// A cache on the meta device cannot be read: what is saved throws, in a destructor.
TEST(Scheduler, EndsWithoutReadingTheCache) {
  StatePool states({{{StateKind::kDelta, {1, 1, 1}, at::kFloat}}}, /*num_slots=*/2, c10::kCPU);
  KvCache kv({.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .block_size = 16}, /*num_blocks=*/5, c10::kMeta);
  {
    Scheduler scheduler({}, states, kv);
    const auto request = std::make_shared<const Request>(Request{.prompt = std::vector<int32_t>(64, 1), .n = 2});
    for (int64_t branch = 0; branch < 2; ++branch) scheduler.add(std::make_unique<Sequence>(0, request, branch));
    const std::vector<ScheduledStep> steps = scheduler.schedule();
    ASSERT_EQ(steps.size(), 1u);
    steps[0].sequence->memory.advance(64);
    const std::vector<Sequence*> forks = scheduler.fork(*steps[0].sequence);
    ASSERT_EQ(forks.size(), 1u);
    EXPECT_FALSE(forks[0]->memory.is_resident()) << "else nothing would be saved for it";
  }
  EXPECT_EQ(kv.num_free(), 5);
  EXPECT_EQ(states.num_free(), 2);
}

TEST_F(SchedulerTest, TheSlotsOfASpoiltSequenceAreCleared) {
  make(/*max_tokens_per_step=*/200, /*num_slots=*/2, /*num_blocks=*/1000);
  add(1, 10, 5);
  add(2, 10, 5);
  step();
  const at::Tensor& pool = states_->layers()[0].components()[0].pool;
  pool.fill_(std::numeric_limits<float>::quiet_NaN());
  const int32_t slot = sequences_[1]->memory.own_slot(SlotGroup::kCheckpoint).index();
  sequences_[1]->is_spoilt = true;
  scheduler_->remove_failed(2);
  EXPECT_TRUE(pool.isnan().all().item<bool>()) << "a failed step need not clear anything";
  scheduler_->remove_failed(1);
  EXPECT_EQ(pool[slot].item<float>(), 0.0f);
  EXPECT_TRUE(pool[1 - slot].isnan().all().item<bool>());
}

TEST_F(SchedulerTest, SplitsPromptsOnlyAtMultiplesOfTheChunk) {
  make(/*max_tokens_per_step=*/200, /*num_slots=*/4, /*num_blocks=*/1000);
  add(1, 500);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 192}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 192}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 116}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}}));
}

TEST_F(SchedulerTest, EveryPieceButTheLastIsAMultipleOfTheChunk) {
  make(/*max_tokens_per_step=*/150, /*num_slots=*/8, /*num_blocks=*/1000);
  const std::vector<int64_t> sizes{1, 63, 64, 65, 300, 129, 128, 7};
  for (size_t i = 0; i < sizes.size(); ++i) add(static_cast<RequestId>(i), sizes[i], 100);
  std::vector<int64_t> done(sizes.size(), 0);
  for (int i = 0; i < 20; ++i) {
    int64_t num_tokens = 0;
    for (const auto& [id, count] : step()) {
      const int64_t left = sizes[id] - done[id];
      if (left > 0) {
        EXPECT_TRUE(count == left || (count < left && count % 64 == 0)) << "request " << id << " piece " << count;
        EXPECT_GT(count, 0);
      } else {
        EXPECT_EQ(count, 1);
      }
      done[id] += count;
      num_tokens += count;
    }
    EXPECT_LE(num_tokens, 150);
  }
  for (size_t i = 0; i < sizes.size(); ++i) EXPECT_GT(done[i], sizes[i]) << "request " << i;
}

TEST_F(SchedulerTest, DecodesComeFirstAndTakeFromTheBudget) {
  make(/*max_tokens_per_step=*/130, /*num_slots=*/4, /*num_blocks=*/1000);
  add(1, 3, 10);
  add(2, 5, 10);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 3}, {2, 5}}));
  add(3, 300, 10);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 128}}));
  add(4, 40, 10);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 128}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 44}, {4, 40}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 1}, {4, 1}}));
}

TEST_F(SchedulerTest, DecodesNeverStarveAPrompt) {
  make(/*max_tokens_per_step=*/64, /*num_slots=*/4, /*num_blocks=*/1000);
  for (RequestId id : {1, 2, 3}) add(id, 2, 50);
  step();
  add(4, 130, 1);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 1}, {4, 64}}));
}

TEST_F(SchedulerTest, AdmitsByFreeSlotsInTheOrderOfArrival) {
  make(/*max_tokens_per_step=*/2048, /*num_slots=*/2, /*num_blocks=*/1000);
  for (RequestId id : {1, 2, 3, 4}) add(id, 10, 5);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 10}, {2, 10}}));
  EXPECT_EQ(scheduler_->num_running(), 2);
  EXPECT_EQ(scheduler_->num_waiting(), 2);
  EXPECT_EQ(states_->num_free(), 0);
  EXPECT_NE(scheduler_->remove(2), nullptr);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {3, 10}}));
  EXPECT_EQ(scheduler_->num_waiting(), 1);
}

TEST_F(SchedulerTest, AdmitsByFreeBlocksAndNobodyOvertakes) {
  make(/*max_tokens_per_step=*/2048, /*num_slots=*/8, /*num_blocks=*/10);
  add(1, 70, 10);  // 5 blocks
  add(2, 80, 16);  // 6 blocks: waits
  add(3, 1, 1);    // 1 block: would fit, but 2 is older
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 70}}));
  EXPECT_EQ(kv_->num_free(), 5);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}}));
  scheduler_->remove(1);
  EXPECT_EQ(step(), (std::vector<Piece>{{2, 80}, {3, 1}}));
  EXPECT_EQ(kv_->num_free(), 3);
}

TEST_F(SchedulerTest, ASequenceTakesBlocksAsItGrows) {
  make(/*max_tokens_per_step=*/64, /*num_slots=*/2, /*num_blocks=*/20);
  add(1, 95, 40);
  step();
  EXPECT_EQ(kv_->num_free(), 14) << "95 tokens and the next one";
  step();
  step();
  EXPECT_EQ(kv_->num_free(), 14);
  step();
  EXPECT_EQ(kv_->num_free(), 13) << "the 97th token";
}

TEST_F(SchedulerTest, DraftsAreVerifiedWithTheLastTokenAndHaveRoom) {
  make(/*max_tokens_per_step=*/70, /*num_slots=*/2, /*num_blocks=*/20);
  add(1, 14, 40);
  step();
  EXPECT_EQ(kv_->num_free(), 19) << "14 tokens and the next one";
  sequences_.at(1)->drafts = {5, 6, 7};
  add(2, 130, 4);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 64}})) << "drafts take from the budget";
  EXPECT_EQ(last_[0].num_drafts, 3);
  EXPECT_EQ(kv_->num_free(), 18 - 9) << "the 15th token and three drafts need a second block";
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 66}}));
  EXPECT_EQ(last_[0].num_drafts, 0);
}

TEST_F(SchedulerTest, APieceThatBeginsWithinAChunkEndsWithIt) {
  make(/*max_tokens_per_step=*/200, /*num_slots=*/2, /*num_blocks=*/1000);
  add(1, 10, 40);
  step();
  Sequence& sequence = *sequences_.at(1);
  sequence.tokens.resize(300, 3);  // a conversation goes on: 10 tokens are computed
  sequence.prefill_end = 300;
  std::vector<std::pair<int64_t, int64_t>> pieces;
  for (int i = 0; i < 3; ++i) {
    for (const ScheduledStep& piece : scheduler_->schedule()) {
      EXPECT_EQ(piece.kind, SegmentKind::kPrefill);
      pieces.emplace_back(sequence.num_computed(), piece.num_tokens);
      sequence.memory.advance(piece.num_tokens);
    }
  }
  EXPECT_EQ(pieces, (std::vector<std::pair<int64_t, int64_t>>{{10, 54}, {64, 192}, {256, 44}}));
}

TEST_F(SchedulerTest, TheYoungestGivesItsBlocksAndComesBackFirst) {
  make(/*max_tokens_per_step=*/2048, /*num_slots=*/4, /*num_blocks=*/6);
  add(1, 31, 40);  // 2 blocks
  add(2, 31, 40);  // 2 blocks
  add(3, 31, 2);   // 2 blocks
  add(4, 1, 1);    // waits
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 31}, {2, 31}, {3, 31}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}, {3, 1}}));
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {2, 1}})) << "1 and 2 took the blocks of 3";
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_EQ(scheduler_->num_running(), 3);
  EXPECT_EQ(scheduler_->num_waiting(), 1) << "nobody is admitted before 3 is back";
  EXPECT_EQ(states_->num_free(), 1);
  scheduler_->remove(2);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {3, 1}}));
  scheduler_->remove(3);
  EXPECT_EQ(step(), (std::vector<Piece>{{1, 1}, {4, 1}}));
}

TEST_F(SchedulerTest, APreemptedSequenceCanBeRemoved) {
  make(/*max_tokens_per_step=*/2048, /*num_slots=*/2, /*num_blocks=*/4);
  add(1, 31, 33);
  add(2, 31, 33);
  for (int i = 0; i < 4; ++i) step();
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_NE(scheduler_->remove(2), nullptr);
  EXPECT_NE(scheduler_->remove(1), nullptr);
  EXPECT_EQ(states_->num_free(), 2);
  EXPECT_EQ(kv_->num_free(), 4);
}

TEST_F(SchedulerTest, RemoveFreesWaitingAndRunning) {
  make(/*max_tokens_per_step=*/2048, /*num_slots=*/2, /*num_blocks=*/10);
  for (RequestId id : {1, 2, 3, 4}) add(id, 20, 5);
  step();
  EXPECT_EQ(scheduler_->remove(99), nullptr);
  for (RequestId id : {3, 1, 4, 2}) {
    const std::unique_ptr<Sequence> removed = scheduler_->remove(id);
    ASSERT_NE(removed, nullptr);
    EXPECT_EQ(removed->id, id);
    EXPECT_EQ(scheduler_->remove(id), nullptr);
  }
  EXPECT_EQ(scheduler_->num_running() + scheduler_->num_waiting(), 0);
  EXPECT_EQ(states_->num_free(), 2);
  EXPECT_EQ(kv_->num_free(), 10);
  EXPECT_TRUE(scheduler_->schedule().empty());
}

TEST_F(SchedulerTest, RefusesWhatCouldNotRunAlone) {
  make(/*max_tokens_per_step=*/64, /*num_slots=*/2, /*num_blocks=*/4);
  const auto request = [](size_t prompt, int64_t max_new_tokens) {
    return Request{.prompt = std::vector<int32_t>(prompt, 1), .max_new_tokens = max_new_tokens};
  };
  EXPECT_NO_THROW(scheduler_->check_fits(request(60, 4)));
  expect_error<RequestError>([&] { scheduler_->check_fits(request(60, 5)); }, {"64 KV cache tokens", "60 + 5"});
  expect_error<RequestError>([&] { scheduler_->check_fits(request(65, 1)); }, {"65 + 1"});
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  expect_error<RequestError>([&] { scheduler_->check_fits(request(60, kMost)); }, {"64 KV cache tokens"});

  make(/*max_tokens_per_step=*/64, /*num_slots=*/2, /*num_blocks=*/0, /*num_attention_layers=*/0);
  EXPECT_NO_THROW(scheduler_->check_fits(request(60, 1000)));
  make(/*max_tokens_per_step=*/64, /*num_slots=*/0, /*num_blocks=*/4);
  expect_error<RequestError>([&] { scheduler_->check_fits(request(1, 1)); }, {"state slot"});
}

TEST_F(SchedulerTest, AStepHoldsAtLeastOneChunk) {
  expect_error<RequestError>([&] { make(63, 1, 1); }, {"max_tokens_per_step", "at least 64", "63"});
}

}  // namespace
}  // namespace xgdn::testing
