// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/engine_loop.h"

#include <c10/util/StringUtil.h>

#include <iostream>
#include <utility>

namespace xgdn {
namespace {

constexpr std::chrono::milliseconds kPauseAfterFailure(100);  // a step that keeps failing shall not take the processor

// The message of what `f` throws, if it does.
template <class F>
std::optional<std::string> caught(const F& f) {
  try {
    f();
    return {};
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception without a message";
  }
}

}  // namespace

EngineCounters counters(const Engine& engine) {
  return {.num_free_slots = engine.num_free_slots(),
          .num_free_kv_blocks = engine.num_free_kv_blocks(),
          .num_preemptions = engine.num_preemptions(),
          .prefix_cache = engine.prefix_cache_stats(),
          .speculation = engine.speculation_stats(),
          .device_error = engine.device_error(),
          .last_step = engine.last_step()};
}

EngineLoop::EngineLoop(Engine& engine, EngineLoopHooks hooks)
    : engine_(engine), hooks_(std::move(hooks)), counters_(xgdn::counters(engine)) {
  const std::lock_guard lock(mutex_);  // the thread waits for it, and then may ask which thread it is
  thread_ = std::thread([this] { run(); });
}

EngineLoop::~EngineLoop() {
  stop();
  thread_.join();
}

RequestId EngineLoop::submit(Request request, Callback callback) {
  // The map's pointer is the only one: the loop may end the request before this returns, and destroys the callback.
  Waiting waiting{.callback = std::make_shared<const Callback>(std::move(callback)),
                  .branches = {},
                  .prompt_size = std::ssize(request.prompt)};
  const int64_t n = request.n;
  const std::lock_guard lock(mutex_);  // until the callback is there, so that no event comes too early
  if (is_closed_) throw StoppedError("[EngineLoop] submit: expected a loop that takes requests, got one that ends");
  const RequestId id = engine_.submit(std::move(request));
  for (int64_t branch = 0; branch < n; ++branch) waiting.branches.insert(branch);
  requests_.emplace(id, std::move(waiting));
  wake_.notify_one();
  return id;
}

void EngineLoop::drain(std::optional<std::chrono::milliseconds> limit) {
  if (is_own_thread()) throw Error("[EngineLoop] drain: expected another thread than the loop's own");
  std::unique_lock lock(mutex_);
  is_closed_ = true;
  const auto is_drained = [this] { return requests_.empty() && !is_delivering_; };
  if (limit && !ended_.wait_for(lock, *limit, is_drained)) {
    for (const auto& [id, waiting] : requests_) engine_.cancel(id);
  }
  ended_.wait(lock, is_drained);
}

void EngineLoop::stop() {
  std::unique_lock lock(mutex_);
  is_closed_ = is_stopping_ = true;
  wake_.notify_all();
  if (!is_own_thread()) ended_.wait(lock, [this] { return has_ended_; });
}

EngineCounters EngineLoop::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

int64_t EngineLoop::num_requests() const {
  const std::lock_guard lock(mutex_);
  return std::ssize(requests_);
}

void EngineLoop::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return is_stopping_ || !requests_.empty() || !engine_.is_idle(); });
    if (is_stopping_) break;
    lock.unlock();
    const bool is_good = step();
    lock.lock();
    if (!is_good) wake_.wait_for(lock, kPauseAfterFailure, [this] { return is_stopping_; });
  }
  lock.unlock();
  deliver(end_all("the engine loop was stopped"));
  lock.lock();
  has_ended_ = true;
  ended_.notify_all();
}

// False when it failed as a whole: what fails within Engine::step has become events.
bool EngineLoop::step() {
  std::vector<RequestEvent> events;
  const std::vector<RequestId> overdue = this->overdue();
  const std::optional<std::string> error = caught([&] {
    if (hooks_.before_step) hooks_.before_step();
    events = engine_.step();
  });
  if (error) {
    report("a step failed: " + *error);
    events = end_all(*error);
  } else if (events.empty() && !overdue.empty()) {
    events = end(overdue, "another caller of Engine::step took the request's events");
  }
  deliver(events);
  return !error;
}

// The requests that have ended in the engine: in steps of those who stream, so that the next step has their events.
std::vector<RequestId> EngineLoop::overdue() const {
  const std::lock_guard lock(mutex_);
  std::vector<RequestId> ids;
  if (!engine_.is_idle()) return ids;
  for (const auto& [id, waiting] : requests_) ids.push_back(id);
  return ids;
}

// Cancels requests, and makes for each of their branches the event that says why.
std::vector<RequestEvent> EngineLoop::end(const std::vector<RequestId>& ids, const std::string& error) {
  const std::lock_guard lock(mutex_);
  std::vector<RequestEvent> events;
  for (const RequestId id : ids) {
    const Waiting& waiting = requests_.at(id);
    engine_.cancel(id);
    for (const int64_t branch : waiting.branches) {
      events.push_back({.id = id,
                        .prompt_size = waiting.prompt_size,
                        .finish_reason = FinishReason::kError,
                        .error = error,
                        .branch = branch});
    }
  }
  return events;
}

std::vector<RequestEvent> EngineLoop::end_all(const std::string& error) {
  std::vector<RequestId> ids;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, waiting] : requests_) ids.push_back(id);
  }
  return end(ids, error);
}

void EngineLoop::deliver(const std::vector<RequestEvent>& events) {
  const EngineCounters now = xgdn::counters(engine_);
  std::vector<std::pair<std::shared_ptr<const Callback>, const RequestEvent*>> calls;
  {
    const std::lock_guard lock(mutex_);
    counters_ = now;
    is_delivering_ = true;
    for (const RequestEvent& event : events) {
      const auto waiting = requests_.find(event.id);
      if (waiting == requests_.end()) continue;  // ended by end_all, or submitted to the engine itself
      calls.emplace_back(waiting->second.callback, &event);
      if (event.finish_reason == FinishReason::kRunning) continue;
      waiting->second.branches.erase(event.branch);
      if (waiting->second.branches.empty()) requests_.erase(waiting);
    }
  }
  const auto run = [&] {
    std::set<RequestId> dropped;
    for (const auto& [callback, event] : calls) {
      if (!callback || !*callback || dropped.contains(event->id)) continue;
      if (const auto error = caught([&] { (*callback)(*event); })) {
        report("a request's callback failed: " + *error);
        drop_callback(event->id);
        dropped.insert(event->id);
      }
    }
    calls.clear();  // the callbacks of requests that have ended are destroyed where they were called
    if (!hooks_.after_step) return;
    if (const auto error = caught([&] { hooks_.after_step(now); })) report("after_step failed: " + *error);
  };
  if (const auto error = caught([&] { hooks_.deliver ? hooks_.deliver(run) : run(); })) {
    report("deliver failed: " + *error);
  }
  const std::lock_guard lock(mutex_);
  is_delivering_ = false;
  ended_.notify_all();
}

void EngineLoop::drop_callback(RequestId id) {
  std::shared_ptr<const Callback> callback;  // destroyed after the lock
  const std::lock_guard lock(mutex_);
  const auto waiting = requests_.find(id);
  if (waiting == requests_.end()) return;
  callback = std::exchange(waiting->second.callback, nullptr);
  engine_.cancel(id);
}

void EngineLoop::report(const std::string& message) const {
  if (!hooks_.on_error) {
    std::cerr << "xgdn: " << message << '\n';
  } else if (const auto error = caught([&] { hooks_.on_error(message); })) {
    std::cerr << "xgdn: " << message << "; and on_error failed: " << *error << '\n';
  }
}

}  // namespace xgdn
