// SPDX-License-Identifier: Apache-2.0
// The scheduler under random requests, with and without cached prefixes, against a pretended model: what tokens leave
// in state and cache are numbers that follow from them, so every bit that a step reads has one right value.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "core/runtime/scheduler.h"

namespace xgdn::testing {
namespace {

using Branch = std::pair<RequestId, int64_t>;

struct Sizes {
  int64_t num_slots, num_blocks, block_size, max_tokens_per_step;
  int64_t num_prefix_slots = 0;
  bool has_replay_states = false;
};

std::vector<StateSpec> specs(const Sizes& sizes) {
  std::vector<StateSpec> specs{{StateKind::kDelta, {1}, at::kFloat}};
  if (sizes.has_replay_states) specs.push_back({StateKind::kRingLength, {}, at::kInt});
  return specs;
}

class PretendedEngine {
 public:
  explicit PretendedEngine(const Sizes& sizes, uint64_t seed)
      : sizes_(sizes),
        generator_(seed),
        states_({specs(sizes)}, sizes.num_slots + sizes.num_prefix_slots, c10::kCPU, /*poison_freed=*/true),
        kv_({.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .block_size = sizes.block_size}, sizes.num_blocks,
            c10::kCPU),
        scheduler_({.max_tokens_per_step = sizes.max_tokens_per_step, .num_prefix_slots = sizes.num_prefix_slots},
                   states_, kv_) {}

  void submit(RequestId id, int64_t prompt_size, int64_t max_new_tokens, int64_t n) {
    const auto request = std::make_shared<const Request>(
        Request{.prompt = draw_prompt(prompt_size), .max_new_tokens = max_new_tokens, .n = n});
    scheduler_.check_fits(*request);
    for (int64_t branch = 0; branch < n; ++branch) {
      auto sequence = std::make_unique<Sequence>(id, request, branch);
      sequences_.insert(sequence.get());
      scheduler_.add(std::move(sequence));
      alive_.insert({id, branch});
    }
  }

  /// Takes a branch out; false when it is not there.
  bool cancel(Branch branch) {
    const std::unique_ptr<Sequence> removed = scheduler_.remove(branch.first, branch.second);
    EXPECT_EQ(removed != nullptr, alive_.erase(branch) == 1);
    if (removed == nullptr) return false;
    EXPECT_EQ(Branch(removed->id, removed->branch), branch);
    sequences_.erase(removed.get());
    replies_.push_back(removed->tokens);
    return true;
  }

  /// As cancel, for a branch whose request is spoilt: its other branches end as well.
  void fail(RequestId id) {
    for (int64_t branch = 0; branch < 9; ++branch) {
      const std::unique_ptr<Sequence> removed = scheduler_.remove_failed(id, branch);
      EXPECT_EQ(removed != nullptr, alive_.erase({id, branch}) == 1);
      sequences_.erase(removed.get());
    }
  }

  void step() {
    const std::vector<ScheduledStep> steps = scheduler_.schedule();
    ASSERT_EQ(steps.empty(), alive_.empty()) << "nobody runs";
    check_order(steps);
    for (const ScheduledStep& step : steps) check_what_it_reads(step);
    for (const ScheduledStep& step : steps) {
      num_accepted_[step.sequence] = draw(step.num_drafts + 1);
      write(step);
    }
    check_blocks();
    std::vector<Branch> finished;
    for (const ScheduledStep& step : steps) book(step, finished);
    for (const Branch& branch : finished) {
      EXPECT_TRUE(cancel(branch));
      ++num_finished_;
    }
  }

  void expect_all_free() const {
    EXPECT_EQ(scheduler_.num_free_slots(), sizes_.num_slots);
    EXPECT_EQ(scheduler_.num_free_blocks(), sizes_.num_blocks);
    EXPECT_EQ(states_.num_free(), states_.num_slots() - prefix_cache_stats().num_prefixes);
    EXPECT_EQ(scheduler_.num_running() + scheduler_.num_waiting(), 0);
  }

  const std::set<Branch>& alive() const { return alive_; }
  int64_t num_finished() const { return num_finished_; }
  int64_t num_verified() const { return num_verified_; }
  int64_t num_preemptions() const { return scheduler_.num_preemptions(); }
  PrefixCacheStats prefix_cache_stats() const { return scheduler_.prefixes().stats(); }

 private:
  // The beginning of one of two texts, or of what another sequence has come to, and then tokens of its own.
  std::vector<int32_t> draw_prompt(int64_t size) {
    std::vector<int32_t> prompt;
    const int64_t text = draw(4);
    const int64_t num_shared = text >= 2 ? size : draw(size + 1);
    if (text >= 2 && !replies_.empty())
      prompt = replies_[replies_.size() - 1 - draw(std::min<size_t>(replies_.size(), 5))];
    for (int64_t i = std::ssize(prompt); i < num_shared; ++i)
      prompt.push_back(static_cast<int32_t>((i * 7 + text) % 1009));
    prompt.resize(static_cast<size_t>(std::min(num_shared, std::ssize(prompt))));
    while (std::ssize(prompt) < size) prompt.push_back(static_cast<int32_t>(draw(1009)));
    return prompt;
  }

  // What follows the first `position` tokens of a sequence.
  static int32_t next_token(const Sequence& s, int64_t position) {
    return static_cast<int32_t>((s.id * 131 + s.branch * 37 + position * 7) % 1009);
  }

  static float token(const Sequence& s, int64_t position) {
    return static_cast<float>(position < s.num_tokens() ? s.tokens[position] : next_token(s, position));
  }

  // Exact in fp32, and another number for another history.
  static float state_after(const Sequence& s, int64_t count) {
    int64_t state = 1;
    for (int64_t i = 0; i < count; ++i) state = (state * 31 + static_cast<int64_t>(token(s, i))) % 65521;
    return static_cast<float>(state);
  }

  float* state(const StateSlot& slot) {
    return states_.layers()[0].components()[0].pool.mutable_data_ptr<float>() + slot.index();
  }

  float* key(const std::vector<int32_t>& blocks, int64_t position) {
    const int64_t row = blocks.at(position / sizes_.block_size) * sizes_.block_size + position % sizes_.block_size;
    return kv_.layers()[0].k.mutable_data_ptr<float>() + row;
  }

  void check_what_it_reads(const ScheduledStep& step) {
    const Sequence& s = *step.sequence;
    const std::vector<int32_t>& blocks = s.memory.blocks();
    EXPECT_GE(std::ssize(blocks), kv_.blocks_for(std::max(s.num_computed(), s.prefill_end) + 1 + s.num_drafts()));
    for (int64_t i = 0; i < s.num_computed(); ++i) {
      ASSERT_EQ(*key(blocks, i), token(s, i)) << "request " << s.id << " branch " << s.branch << " token " << i;
    }
    if (s.num_computed() == 0) return;
    ASSERT_EQ(*state(s.memory.read_slot(SlotGroup::kCheckpoint)), state_after(s, s.num_computed()))
        << "request " << s.id << " branch " << s.branch << " after " << s.num_computed();
  }

  void write(const ScheduledStep& step) {
    const Sequence& s = *step.sequence;
    const std::vector<int32_t>& blocks = s.memory.blocks();
    const int64_t end = s.num_computed() + step.num_tokens + num_accepted_[&s];
    for (int64_t i = s.num_computed(); i < s.num_tokens() + step.num_drafts; ++i) {
      EXPECT_EQ(kv_.ref_count(blocks.at(i / sizes_.block_size)), 1) << "a shared block is written";
      *key(blocks, i) = i < end ? token(s, i) : -1;  // refused drafts
    }
    *state(s.memory.own_slot(SlotGroup::kCheckpoint)) = state_after(s, end);
  }

  void book(const ScheduledStep& step, std::vector<Branch>& finished) {
    Sequence& s = *step.sequence;
    for (int64_t i = 0; i < num_accepted_[&s]; ++i) s.tokens.push_back(next_token(s, s.num_tokens()));
    s.drafts.clear();
    ScheduledStep done = step;
    done.num_tokens += num_accepted_[&s];
    scheduler_.advance(done);
    if (!s.is_prefilled()) return;
    std::vector<Sequence*> moved{&s};
    if (step.kind == SegmentKind::kPrefill) {
      for (Sequence* branch : scheduler_.fork(s)) moved.push_back(branch);
    }
    for (Sequence* sequence : moved) {
      sequence->tokens.push_back(next_token(*sequence, sequence->num_tokens()));
      const int64_t num_left = sequence->request->max_new_tokens - sequence->num_generated();
      if (num_left == 0) finished.emplace_back(sequence->id, sequence->branch);
      if (num_left > 1 && draw(3) == 0)
        sequence->drafts.resize(static_cast<size_t>(draw(std::min<int64_t>(num_left, 4))));
    }
  }

  // The budget; the order of arrival; and no gap: a branch that has a token gets the next one in every step, but for
  // the one in which the others read its state, and while older ones have its blocks.
  void check_order(const std::vector<ScheduledStep>& steps) {
    int64_t num_decodes = 0, num_prompt_tokens = 0;
    std::set<Branch> in_step;
    for (const auto& [sequence, kind, num_tokens, num_drafts] : steps) {
      (sequence->is_prefilled() ? num_decodes : num_prompt_tokens) += num_tokens + num_drafts;
      EXPECT_EQ(kind == SegmentKind::kPrefill, !sequence->is_prefilled());
      EXPECT_EQ(kind == SegmentKind::kVerify, num_drafts > 0);
      num_verified_ += num_drafts;
      EXPECT_TRUE(sequence->memory.is_resident() && !sequence->is_parked);
      EXPECT_TRUE(in_step.insert({sequence->id, sequence->branch}).second);
      for (const Branch& other : alive_) {
        EXPECT_FALSE(other.first > newest_started_ && other.first < sequence->id)
            << "request " << sequence->id << " starts before " << other.first;
      }
      newest_started_ = std::max(newest_started_, sequence->id);
    }
    std::map<int32_t, const Sequence*> writers;
    for (const ScheduledStep& step : steps)
      writers[step.sequence->memory.own_slot(SlotGroup::kCheckpoint).index()] = step.sequence;
    for (const ScheduledStep& step : steps) {
      const auto writer = writers.find(step.sequence->memory.read_slot(SlotGroup::kCheckpoint).index());
      EXPECT_TRUE(writer == writers.end() || writer->second == step.sequence) << "it reads what another writes";
    }
    EXPECT_LE(num_prompt_tokens, std::max<int64_t>(sizes_.max_tokens_per_step - num_decodes, 64));
    for (const Sequence* sequence : sequences_) {
      const Branch branch{sequence->id, sequence->branch};
      if (sequence->num_generated() == 0 || !sequence->is_prefilled() || in_step.contains(branch)) continue;
      if (sequence->memory.is_resident()) {
        const bool is_read = std::any_of(steps.begin(), steps.end(), [&](const ScheduledStep& step) {
          return step.sequence->memory.read_slot(SlotGroup::kCheckpoint).index() ==
                 sequence->memory.own_slot(SlotGroup::kCheckpoint).index();
        });
        EXPECT_TRUE(is_read) << "a gap: request " << sequence->id << " branch " << sequence->branch;
      } else {
        EXPECT_GT(branch, *in_step.rbegin()) << "a younger one has its blocks";
      }
    }
  }

  // Every block is free, or held by branches of one request that are resident, or by a prefix.
  void check_blocks() {
    std::map<int32_t, std::set<RequestId>> holders;
    for (const Sequence* sequence : sequences_) {
      if (!sequence->memory.is_resident()) continue;
      for (const int32_t block : sequence->memory.blocks()) holders[block].insert(sequence->id);
    }
    EXPECT_EQ(std::ssize(holders) + scheduler_.num_free_blocks(), sizes_.num_blocks);
    if (sizes_.num_prefix_slots > 0) return;
    EXPECT_EQ(scheduler_.num_free_blocks(), kv_.num_free());
    for (const auto& [block, ids] : holders) EXPECT_EQ(ids.size(), 1u) << "block " << block;
  }

  int64_t draw(int64_t end) { return static_cast<int64_t>(generator_() % static_cast<uint64_t>(end)); }  // 0..end-1

  Sizes sizes_;
  std::mt19937_64 generator_;  // of drafts
  StatePool states_;
  KvCache kv_;
  Scheduler scheduler_;
  std::set<Branch> alive_;
  std::set<const Sequence*> sequences_;
  std::vector<std::vector<int32_t>> replies_;  // prompts and what followed them
  RequestId newest_started_ = 0;
  int64_t num_finished_ = 0;
  int64_t num_verified_ = 0;
  std::map<const Sequence*, int64_t> num_accepted_;  // drafts in the step
};

TEST(SchedulerRandom, EveryStepReadsWhatItsRequestWrote) {
  int64_t num_preemptions = 0, num_finished = 0, num_verified = 0;
  int64_t num_found = 0, num_evictions = 0;
  for (uint64_t seed = 0; seed < 300 && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 generator(seed);
    const auto draw = [&](int64_t least, int64_t most) {
      return least + static_cast<int64_t>(generator() % static_cast<uint64_t>(most - least + 1));
    };
    const int64_t block_size = draw(1, 40);
    const int64_t num_prefix_slots = static_cast<int64_t>(seed % 3) * draw(1, 8);
    const int64_t longest = num_prefix_slots > 0 ? 400 : 150;
    const int64_t num_cached_tokens = longest + 40 + draw(0, 200) + (num_prefix_slots > 0 ? draw(0, 1) * 1500 : 0);
    const Sizes sizes{.num_slots = draw(4, 9),
                      .num_blocks = (num_cached_tokens + block_size - 1) / block_size,
                      .block_size = block_size,
                      .max_tokens_per_step = draw(64, 200),
                      .num_prefix_slots = num_prefix_slots,
                      .has_replay_states = draw(0, 1) == 1};
    PretendedEngine engine(sizes, seed);
    constexpr RequestId kRequests = 25;
    RequestId id = 0;
    int64_t num_steps = 0;
    while ((id < kRequests || !engine.alive().empty()) && !::testing::Test::HasFailure()) {
      if (id < kRequests && draw(0, 5) == 0) engine.submit(++id, draw(1, longest), draw(1, 40), draw(1, 4));
      if (!engine.alive().empty() && draw(0, 40) == 0) {
        engine.cancel(*std::next(engine.alive().begin(), draw(0, std::ssize(engine.alive()) - 1)));
      }
      if (!engine.alive().empty() && draw(0, 200) == 0) engine.fail(engine.alive().begin()->first);
      engine.step();
      ASSERT_LT(++num_steps, 25 * 4 * (40 + 3)) << "longer than one branch after the other";
    }
    engine.expect_all_free();
    num_preemptions += engine.num_preemptions();
    num_finished += engine.num_finished();
    num_verified += engine.num_verified();
    num_found += engine.prefix_cache_stats().num_found;
    num_evictions += engine.prefix_cache_stats().num_evictions;
  }
  EXPECT_GE(num_preemptions, 1000);
  EXPECT_GE(num_finished, 5000);
  EXPECT_GE(num_verified, 5000);
  EXPECT_GE(num_found, 10000);
  EXPECT_GE(num_evictions, 2000);
}

}  // namespace
}  // namespace xgdn::testing
