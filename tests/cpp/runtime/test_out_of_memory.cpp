// SPDX-License-Identifier: Apache-2.0
// An engine that gets no memory, at one allocation after the other: no request is lost or half there, and the next one
// has its tokens.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <set>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

thread_local int64_t calls_until_failure = -1;  // of this thread's operator new; negative: none fails

/// The calling thread's allocation of number `at` fails, once.
class FailingAllocation {
 public:
  explicit FailingAllocation(int64_t at) { calls_until_failure = at; }
  ~FailingAllocation() { calls_until_failure = -1; }
  static bool has_failed() { return calls_until_failure < 0; }
};

}  // namespace
}  // namespace xgdn::testing

// Of the whole program, also where the library calls it. Inlined, GCC takes the pair for a mismatch.
[[gnu::noinline]] void* operator new(size_t size) {
  int64_t& left = xgdn::testing::calls_until_failure;
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  if (void* const memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace xgdn::testing {
namespace {

struct Kind {
  const char* name;
  bool has_replay_states;
  int64_t max_draft_tokens;
  bool run_ahead;
};

class OutOfMemory : public ::testing::TestWithParam<Kind> {
 protected:
  OutOfMemory()
      : model_(tiny_model(
            tiny_config(), tiny_weights(tiny_config()),
            {.has_replay_states = GetParam().has_replay_states, .max_draft_tokens = GetParam().max_draft_tokens})) {}

  static std::vector<Request> requests() {
    std::vector<Request> some;
    for (const int64_t length : {3, 70}) {
      some.push_back({.prompt = random_tokens(static_cast<uint64_t>(length), length, kNaNToken),
                      .max_new_tokens = 3,
                      .n = length == 3 ? 3 : 1});
    }
    return some;
  }

  // With `is_tight` requests take turns in too few blocks.
  std::unique_ptr<Engine> engine(bool is_tight = false) const {
    return std::make_unique<Engine>(model_, RunnerOptions{.max_batch_size = 4,
                                                          .max_cached_tokens = is_tight ? 96 : 512,
                                                          .kv_block_size = 16,
                                                          .prefix_cache_slots = 2,
                                                          .run_ahead = GetParam().run_ahead});
  }

  static std::vector<std::vector<int32_t>> tokens_of(Engine& engine) {
    std::vector<std::vector<int32_t>> tokens;
    for (const GenerationResult& result : engine.generate(requests())) tokens.push_back(result.tokens);
    return tokens;
  }

  void fail_in_a_step(int64_t failing_step, bool is_tight) const;

  static constexpr int64_t kStride = 3;

  std::shared_ptr<const HybridDecoder> model_;
};

TEST_P(OutOfMemory, ASubmitLeavesAllOfARequestOrNothing) {
  const std::unique_ptr<Engine> engine = this->engine();
  const auto want = tokens_of(*engine);
  const Request request = requests()[0];
  int64_t at = 0;
  for (bool has_failed = true; has_failed; ++at) {
    {
      const FailingAllocation failing(at);
      try {
        engine->submit(request);
      } catch (const std::bad_alloc&) {
      }
      has_failed = FailingAllocation::has_failed();
    }
    ASSERT_EQ(engine->is_idle(), has_failed) << "allocation " << at;
  }
  EXPECT_GT(at, 10);
  while (!engine->is_idle()) engine->step();
  EXPECT_EQ(tokens_of(*engine), want);
}

// In step `failing_step` of each run, one allocation after the other; in what follows everybody ends.
void OutOfMemory::fail_in_a_step(int64_t failing_step, bool is_tight) const {
  const std::unique_ptr<Engine> engine = this->engine(is_tight);
  const auto want = tokens_of(*engine);
  const int64_t num_slots = engine->num_free_slots();
  int64_t at = 0;
  for (bool has_failed = true; has_failed; at += kStride) {
    SCOPED_TRACE(::testing::Message() << "step " << failing_step << ", allocation " << at);
    std::set<std::pair<RequestId, int64_t>> running;
    for (const Request& request : requests()) {
      const RequestId id = engine->submit(request);
      for (int64_t branch = 0; branch < request.n; ++branch) running.insert({id, branch});
    }
    has_failed = false;
    for (int64_t steps = 0; !engine->is_idle(); ++steps) {
      ASSERT_LT(steps, 100);
      std::vector<RequestEvent> events;
      if (steps == failing_step) {
        const FailingAllocation failing(at);
        try {
          events = engine->step();
        } catch (const std::bad_alloc&) {
        }
        has_failed = FailingAllocation::has_failed();
      } else {
        events = engine->step();
      }
      for (const RequestEvent& event : events) {
        if (event.finish_reason == FinishReason::kRunning) continue;
        EXPECT_EQ(running.erase({event.id, event.branch}), 1U);
      }
    }
    ASSERT_TRUE(running.empty()) << "a request ended without a word";
    ASSERT_EQ(engine->num_free_slots(), num_slots);
    ASSERT_EQ(tokens_of(*engine), want);
  }
  EXPECT_GT(at, GetParam().run_ahead ? 10 : 100);  // what was started before is only booked
}

TEST_P(OutOfMemory, AStepEndsRequestsWithAnErrorOrGoesOn) {
  for (const int64_t step : {0, 1, 2, 3}) fail_in_a_step(step, /*is_tight=*/false);
}

TEST_P(OutOfMemory, AStepThatTakesBlocksFromOthersToo) {
  for (const int64_t step : {0, 1, 2, 3, 4}) fail_in_a_step(step, /*is_tight=*/true);
}

INSTANTIATE_TEST_SUITE_P(Kinds, OutOfMemory,
                         ::testing::Values(Kind{"Plain", false, 0, false}, Kind{"PlainAhead", false, 0, true},
                                           Kind{"ReplayAhead", true, 0, true}, Kind{"ReplayDrafts", true, 3, false}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace xgdn::testing
