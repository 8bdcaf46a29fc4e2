// SPDX-License-Identifier: Apache-2.0
// The thread that steps: events come to the right callbacks, whoever submits, cancels, fails or stops meanwhile.
#include "core/runtime/engine_loop.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <semaphore>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/tiny_checkpoint.h"

namespace xgdn::testing {
namespace {

using namespace std::chrono_literals;

constexpr RunnerOptions kSizes{.max_batch_size = 4, .max_cached_tokens = 1024, .poison_freed_slots = true};
constexpr int64_t kForever = 900;  // tokens; more than any test waits for

/// What came for a request. Filled on the loop's thread, read by others after wait().
class Inbox {
 public:
  /// A callback that books events until all `num_branches` have ended.
  EngineLoop::Callback callback(int64_t num_branches = 1) {
    num_running_ = num_branches;
    return [this](const RequestEvent& event) { book(event); };
  }

  void wait() { ended_.get_future().wait(); }
  void wait_for_token() { first_token_.acquire(); }

  const GenerationResult& result(int64_t branch = 0) const { return results_.at(branch); }

 private:
  void book(const RequestEvent& event) {
    GenerationResult& result = results_[event.branch];
    EXPECT_EQ(result.finish_reason, FinishReason::kRunning) << "an event after the last";
    const bool is_first = result.tokens.empty() && !event.tokens.empty();
    result.tokens.insert(result.tokens.end(), event.tokens.begin(), event.tokens.end());
    if (is_first) first_token_.release();
    result.finish_reason = event.finish_reason;
    result.error = event.error;
    if (event.finish_reason != FinishReason::kRunning && --num_running_ == 0) ended_.set_value();
  }

  int64_t num_running_ = 0;
  std::map<int64_t, GenerationResult> results_;
  std::counting_semaphore<> first_token_{0};
  std::promise<void> ended_;
};

/// Holds steps until they are allowed.
class Gate {
 public:
  void allow(std::ptrdiff_t num_steps) { allowed_.release(num_steps); }
  void open() { is_open_ = true, allowed_.release(); }
  void pass() {
    if (!is_open_) allowed_.acquire();
  }

 private:
  std::atomic<bool> is_open_ = false;
  std::counting_semaphore<> allowed_{0};
};

class EngineLoopTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const TemporaryDirectory dir;
    const ModelConfig config = tiny_config();
    write_checkpoint(dir, config, tiny_weights(config));
    engine_ = Engine::load(dir.path(), {.runner = kSizes});
  }
  static void TearDownTestSuite() { engine_.reset(); }

  void TearDown() override {  // a stopped loop leaves cancelled requests to the next step
    while (!engine_->is_idle()) engine_->step();
    EXPECT_EQ(engine_->num_free_slots(), kSizes.max_batch_size);
    EXPECT_EQ(engine_->num_free_kv_blocks(), 64);
  }

  static Request request(int32_t first, int64_t max_new_tokens, int64_t n = 1) {
    return {.prompt = {first, 7, 9},
            .max_new_tokens = max_new_tokens,
            .sampling = {.temperature = 1.0, .seed = static_cast<uint64_t>(first)},
            .ignore_eos = true,
            .n = n};
  }

  static EngineLoopHooks hooks(Gate& gate) {
    return {.before_step = [&gate] { gate.pass(); }};
  }

  static inline std::unique_ptr<Engine> engine_;
};

TEST_F(EngineLoopTest, ThreadsGetTheTokensOfTheirOwnRequests) {
  constexpr int kThreads = 4, kPerThread = 6;
  std::vector<Request> requests;
  for (int32_t i = 0; i < kThreads * kPerThread; ++i) requests.push_back(request(i, 3 + i % 9, 1 + i % 3));
  const std::vector<GenerationResult> want = engine_->generate(requests);

  std::vector<Inbox> inboxes(requests.size());
  std::vector<RequestId> ids(requests.size());
  {
    EngineLoop loop(*engine_);
    std::vector<std::jthread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (size_t i = t * kPerThread; i < static_cast<size_t>((t + 1) * kPerThread); ++i) {
          ids[i] = loop.submit(requests[i], inboxes[i].callback(requests[i].n));
        }
      });
    }
    threads.clear();
    for (Inbox& inbox : inboxes) inbox.wait();
    loop.drain();
    EXPECT_EQ(loop.num_requests(), 0);
    EXPECT_EQ(loop.counters().num_free_slots, kSizes.max_batch_size);
    EXPECT_GT(loop.counters().last_step.num_decodes, 0);
  }
  EXPECT_EQ(std::set<RequestId>(ids.begin(), ids.end()).size(), ids.size());
  size_t next = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    for (int64_t branch = 0; branch < requests[i].n; ++branch) {
      EXPECT_EQ(inboxes[i].result(branch).tokens, want[next++].tokens) << i << ", branch " << branch;
      EXPECT_EQ(inboxes[i].result(branch).finish_reason, FinishReason::kLength);
    }
  }
}

TEST_F(EngineLoopTest, RefusesWhatTheEngineRefuses) {
  EngineLoop loop(*engine_);
  Inbox inbox;
  expect_error<RequestError>([&] { loop.submit({.prompt = {}}, inbox.callback()); }, {"prompt"});
  EXPECT_EQ(loop.num_requests(), 0);
  loop.submit(request(1, 2), inbox.callback());
  inbox.wait();
}

TEST_F(EngineLoopTest, CancelsByIdWhileOthersGoOn) {
  const std::vector<GenerationResult> want = engine_->generate({request(1, 40), request(2, 40, 2)});
  Inbox whole, left, branched;
  EngineLoop loop(*engine_);
  const RequestId to_leave = loop.submit(request(3, kForever), left.callback());
  loop.submit(request(1, 40), whole.callback());
  const RequestId to_prune = loop.submit(request(2, 40, 2), branched.callback(2));
  EXPECT_TRUE(loop.cancel(to_prune, 0));
  left.wait_for_token();
  EXPECT_TRUE(loop.cancel(to_leave));
  left.wait();
  whole.wait();
  branched.wait();
  EXPECT_FALSE(loop.cancel(to_leave));
  EXPECT_EQ(left.result().finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(whole.result().tokens, want[0].tokens);
  EXPECT_EQ(branched.result(0).finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(branched.result(1).tokens, want[2].tokens);
}

TEST_F(EngineLoopTest, CallbacksMaySubmitAndCancel) {
  EngineLoop loop(*engine_);
  Inbox second, other;
  const RequestId to_cancel = loop.submit(request(4, kForever), other.callback());
  bool has_submitted = false;
  loop.submit(request(5, 2), [&](const RequestEvent& event) {
    EXPECT_TRUE(loop.is_own_thread());
    if (std::exchange(has_submitted, true)) return;
    EXPECT_EQ(event.tokens.size(), 1u);
    loop.submit(request(6, 2), second.callback());
    loop.cancel(to_cancel);
    expect_error<Error>([&] { loop.drain(); }, {"drain", "another thread"});
  });
  second.wait();
  other.wait();
  EXPECT_FALSE(loop.is_own_thread());
  EXPECT_EQ(second.result().tokens.size(), 2);
  EXPECT_EQ(other.result().finish_reason, FinishReason::kCancelled);
}

TEST_F(EngineLoopTest, DrainLetsRequestsFinishAndTakesNoMore) {
  Gate gate;
  Inbox inbox;
  EngineLoop loop(*engine_, hooks(gate));
  loop.submit(request(1, 20), inbox.callback());
  std::jthread drain([&] { loop.drain(); });
  while (true) {  // until it drains
    try {
      loop.submit(request(2, 1), {});
      std::this_thread::yield();
    } catch (const StoppedError& error) {
      EXPECT_NE(std::string(error.what()).find("[EngineLoop] submit"), std::string::npos);
      break;
    }
  }
  gate.open();
  drain.join();
  inbox.wait();
  EXPECT_EQ(inbox.result().finish_reason, FinishReason::kLength);
  EXPECT_EQ(inbox.result().tokens.size(), 20);
  EXPECT_TRUE(engine_->is_idle());
  loop.drain();  // nothing is left
}

TEST_F(EngineLoopTest, DrainCancelsWhatTakesTooLong) {
  Inbox inbox;
  EngineLoop loop(*engine_);
  loop.submit(request(1, kForever), inbox.callback());
  inbox.wait_for_token();
  loop.drain(0ms);
  inbox.wait();
  EXPECT_EQ(inbox.result().finish_reason, FinishReason::kCancelled);
  EXPECT_EQ(loop.num_requests(), 0);
}

TEST_F(EngineLoopTest, StopEndsRunningAndWaitingRequests) {
  Gate gate;
  std::vector<Inbox> inboxes(6);  // more than slots
  EngineLoop loop(*engine_, hooks(gate));
  for (int32_t i = 0; i < 6; ++i) loop.submit(request(i, kForever), inboxes[i].callback());
  gate.allow(3);
  inboxes[0].wait_for_token();
  std::jthread stop([&] { loop.stop(); });
  std::jthread again([&] { loop.stop(); });
  gate.open();
  stop.join();
  again.join();
  for (Inbox& inbox : inboxes) {
    inbox.wait();
    EXPECT_EQ(inbox.result().finish_reason, FinishReason::kError);
    EXPECT_NE(inbox.result().error.find("stopped"), std::string::npos);
  }
  EXPECT_EQ(loop.num_requests(), 0);
  expect_error<StoppedError>([&] { loop.submit(request(1, 1), {}); }, {"[EngineLoop] submit"});
  loop.drain();
}

TEST_F(EngineLoopTest, StopsFromACallback) {
  Inbox inbox;
  EngineLoop loop(*engine_);
  loop.submit(request(1, kForever), [&, book = inbox.callback()](const RequestEvent& event) {
    book(event);
    loop.stop();
  });
  inbox.wait();
  loop.stop();
  EXPECT_EQ(inbox.result().finish_reason, FinishReason::kError);
  EXPECT_EQ(inbox.result().tokens.size(), 1);
}

TEST_F(EngineLoopTest, ACallbackThatThrowsCostsItsOwnRequestAlone) {
  const std::vector<GenerationResult> want = engine_->generate({request(1, 30)});
  std::vector<std::string> errors;
  Inbox other, later;
  int num_calls = 0;
  {
    EngineLoop loop(*engine_, {.on_error = [&](const std::string& message) { errors.push_back(message); }});
    loop.submit(request(1, 30), other.callback());
    loop.submit(request(2, kForever, 2), [&](const RequestEvent&) {
      ++num_calls;
      throw std::runtime_error("no ear");
    });
    other.wait();
    loop.submit(request(3, 1), [](const RequestEvent&) { throw 5; });
    loop.submit(request(4, 3), later.callback());
    later.wait();
    loop.drain();
  }
  EXPECT_EQ(num_calls, 1);
  EXPECT_EQ(errors, (std::vector<std::string>{"a request's callback failed: no ear",
                                              "a request's callback failed: an exception without a message"}));
  EXPECT_EQ(other.result().tokens, want[0].tokens);
  EXPECT_EQ(later.result().finish_reason, FinishReason::kLength);
}

TEST_F(EngineLoopTest, AStepThatFailsIsToldToEveryRequestAndTheNextOnesAreServed) {
  Gate gate;
  std::atomic<bool> is_broken = false;
  std::vector<std::string> errors;
  std::vector<Inbox> inboxes(6);
  Inbox branched, later;
  EngineLoop loop(*engine_, {.before_step =
                                 [&] {
                                   gate.pass();
                                   if (is_broken.exchange(false)) throw std::runtime_error("the step broke");
                                 },
                             .on_error = [&](const std::string& message) { errors.push_back(message); }});
  for (int32_t i = 0; i < 6; ++i) loop.submit(request(i, kForever), inboxes[i].callback());
  loop.submit(request(8, kForever, 2), branched.callback(2));
  gate.allow(3);
  inboxes[0].wait_for_token();
  is_broken = true;
  gate.open();
  for (Inbox& inbox : inboxes) {
    inbox.wait();
    EXPECT_EQ(inbox.result().finish_reason, FinishReason::kError);
    EXPECT_EQ(inbox.result().error, "the step broke");
  }
  branched.wait();
  for (const int64_t branch : {0, 1}) EXPECT_EQ(branched.result(branch).error, "the step broke");
  loop.submit(request(1, 5), later.callback());
  later.wait();
  EXPECT_EQ(later.result().finish_reason, FinishReason::kLength);
  loop.drain();
  EXPECT_EQ(errors, std::vector<std::string>{"a step failed: the step broke"});
  EXPECT_EQ(loop.counters().num_free_slots, kSizes.max_batch_size);
}

TEST_F(EngineLoopTest, CallbacksAreCalledAndDestroyedWhereTheHostDelivers) {
  constexpr int kNumRequests = 32;  // many: some end while submit has yet to return
  bool is_within = false;
  std::vector<EngineCounters> counters;
  int num_calls = 0, num_destroyed = 0;
  const auto count_destruction = [&](const int*) {
    EXPECT_TRUE(is_within);
    ++num_destroyed;
  };
  EngineLoop loop(*engine_, {.after_step =
                                 [&](const EngineCounters& now) {
                                   EXPECT_TRUE(is_within);
                                   counters.push_back(now);
                                 },
                             .deliver =
                                 [&](const std::function<void()>& run) {
                                   is_within = true;
                                   run();
                                   is_within = false;
                                 }});
  for (int32_t i = 0; i < kNumRequests; ++i) {
    std::shared_ptr<const int> held(&i, count_destruction);
    loop.submit(request(i, 4), [&, held = std::move(held)](const RequestEvent&) {
      EXPECT_TRUE(is_within);
      ++num_calls;
    });
  }
  loop.drain();
  EXPECT_EQ(num_calls, 4 * kNumRequests);
  EXPECT_EQ(num_destroyed, kNumRequests);
  ASSERT_FALSE(counters.empty());
  EXPECT_EQ(counters.back().num_free_slots, kSizes.max_batch_size);
  EXPECT_EQ(counters.front().device_error, "");
}

TEST_F(EngineLoopTest, SharesStepsWithThoseWhoGenerate) {
  const std::vector<Request> requests{request(1, 30), request(2, 30)};
  const std::vector<GenerationResult> want = engine_->generate(requests);
  Inbox inbox;
  EngineLoop loop(*engine_);
  loop.submit(requests[0], inbox.callback());
  EXPECT_EQ(engine_->generate({requests[1]})[0].tokens, want[1].tokens);
  inbox.wait();
  EXPECT_EQ(inbox.result().tokens, want[0].tokens);
}

TEST_F(EngineLoopTest, ARequestWhoseEventsWereTakenEnds) {
  Gate gate;
  Inbox inbox;
  EngineLoop loop(*engine_, hooks(gate));
  loop.submit(request(1, 3), inbox.callback());
  while (!engine_->is_idle()) engine_->step();
  gate.open();
  inbox.wait();
  EXPECT_EQ(inbox.result().finish_reason, FinishReason::kError);
  EXPECT_NE(inbox.result().error.find("another caller"), std::string::npos);
}

}  // namespace
}  // namespace xgdn::testing
