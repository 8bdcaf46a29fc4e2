// SPDX-License-Identifier: Apache-2.0
// The one thread that steps an engine, for programs that serve: requests come from any thread, events go to callbacks.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/runtime/engine.h"

namespace xgdn {

/// An engine's figures between two steps.
struct EngineCounters {
  int64_t num_free_slots = 0;
  int64_t num_free_kv_blocks = 0;
  int64_t num_preemptions = 0;
  PrefixCacheStats prefix_cache;
  SpeculationStats speculation;
  std::string device_error;  // why every request ends with an error from now on; empty while the device computes
  StepStats last_step;
};

/// Reads them; waits for a step that is under way.
EngineCounters counters(const Engine& engine);

/// What a host may hook into a loop. All are called on the loop's thread, and each may be empty.
struct EngineLoopHooks {
  std::function<void()> before_step = {};                         // what it throws fails the step
  std::function<void(const EngineCounters&)> after_step = {};     // after the step's callbacks
  std::function<void(const std::string& message)> on_error = {};  // of what a step, a callback or a hook threw;
                                                                  // default: a line on stderr

  /// Runs its argument, which calls the callbacks of a step and after_step: for a host whose callbacks need a lock of
  /// its own, such as an interpreter's.
  std::function<void(const std::function<void()>& run)> deliver = {};
};

/// Owns a thread that steps the engine while there is work and sleeps while there is none.
///
/// Every member may be called from any thread at any time, from a callback too; none but drain and stop waits for a
/// step. Requests that others stream or generate on the same engine share the steps. Nobody else calls Engine::submit
/// or Engine::step meanwhile: events of the one's requests would be dropped, and the other would take events from the
/// loop.
class EngineLoop {
 public:
  /// Gets every event of a request, in order, on the loop's thread; the last is the one with which the last of its
  /// branches ends. One that throws is not called again, and its request is cancelled; the others go on.
  using Callback = std::function<void(const RequestEvent&)>;

  /// Starts the thread. The engine must outlive the loop.
  explicit EngineLoop(Engine& engine, EngineLoopHooks hooks = {});

  /// Stops. Not for the loop's own thread.
  ~EngineLoop();

  EngineLoop(const EngineLoop&) = delete;
  EngineLoop& operator=(const EngineLoop&) = delete;

  /// Queues a request; the first event may come before the id is returned. Throws as Engine::submit, and StoppedError
  /// once the loop drains or is stopped.
  RequestId submit(Request request, Callback callback);

  /// Ends a request, or one branch of it, with the next step, as Engine::cancel.
  bool cancel(RequestId id, std::optional<int64_t> branch = {}) { return engine_.cancel(id, branch); }

  /// Takes no more requests and returns when all have ended and their callbacks have returned. What is left after
  /// `limit` is cancelled. Throws Error on the loop's own thread, which would wait for itself.
  void drain(std::optional<std::chrono::milliseconds> limit = {});

  /// Takes no more requests and ends the thread after the step under way. Requests that are left end with kError. On
  /// the loop's own thread returns at once.
  void stop();

  /// The figures after the last step.
  EngineCounters counters() const;

  /// Requests that wait or run.
  int64_t num_requests() const;

  /// Whether the caller runs on the loop's thread.
  bool is_own_thread() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  struct Waiting {
    std::shared_ptr<const Callback> callback;  // null: it threw
    std::set<int64_t> branches;                // not finished
    int64_t prompt_size;
  };

  void run();
  bool step();
  void deliver(const std::vector<RequestEvent>& events);
  void drop_callback(RequestId id);
  void report(const std::string& message) const;
  std::vector<RequestId> overdue() const;
  std::vector<RequestEvent> end(const std::vector<RequestId>& ids, const std::string& error);
  std::vector<RequestEvent> end_all(const std::string& error);

  Engine& engine_;
  const EngineLoopHooks hooks_;

  // Never held while a callback is called, copied or destroyed: it may belong to a host that holds a lock of its own
  // when it calls in.
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable ended_;
  std::map<RequestId, Waiting> requests_;
  EngineCounters counters_;
  bool is_closed_ = false;    // takes no more requests
  bool is_stopping_ = false;  // steps no more
  bool has_ended_ = false;    // calls no more
  bool is_delivering_ = false;

  std::thread thread_;
};

}  // namespace xgdn
