// SPDX-License-Identifier: Apache-2.0
// The thread that steps an engine. It holds the GIL once a step, to deliver; callers wait for it without.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <functional>
#include <optional>

#include "bindings/bind.h"
#include "core/runtime/engine_loop.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

// So that the callbacks of a step take the GIL once and not once each.
void with_gil(const std::function<void()>& run) {
  const nb::gil_scoped_acquire gil;
  if (gil.is_valid()) run();
}

// The loop's thread may wait for the GIL, so whoever waits for the thread must not hold it.
class PythonEngineLoop {
 public:
  PythonEngineLoop(Engine& engine, EngineLoopHooks hooks) {
    const nb::gil_scoped_release release;
    loop_.emplace(engine, std::move(hooks));
  }
  PythonEngineLoop(const PythonEngineLoop&) = delete;
  PythonEngineLoop& operator=(const PythonEngineLoop&) = delete;
  ~PythonEngineLoop() {
    const nb::gil_scoped_release release;
    loop_.reset();
  }

  EngineLoop& operator*() { return *loop_; }

 private:
  std::optional<EngineLoop> loop_;
};

}  // namespace

void bind_engine_loop(nb::module_& m) {
  nb::class_<EngineCounters>(m, "EngineCounters", "An engine's figures between two steps.")
      .def_ro("num_free_slots", &EngineCounters::num_free_slots)
      .def_ro("num_free_kv_blocks", &EngineCounters::num_free_kv_blocks)
      .def_ro("num_preemptions", &EngineCounters::num_preemptions)
      .def_ro("prefix_cache", &EngineCounters::prefix_cache)
      .def_ro("speculation", &EngineCounters::speculation)
      .def_ro("device_error", &EngineCounters::device_error)
      .def_ro("last_step", &EngineCounters::last_step);
  m.def("counters", &counters, "engine"_a, WithoutGil());

  nb::class_<PythonEngineLoop>(m, "EngineLoop", "The thread that steps an engine.")
      .def(
          "__init__",
          [](PythonEngineLoop* self, Engine& engine, std::optional<std::function<void()>> before_step,
             std::optional<std::function<void(const EngineCounters&)>> after_step,
             std::optional<std::function<void(const std::string&)>> on_error) {
            new (self) PythonEngineLoop(engine, {.before_step = before_step.value_or(nullptr),
                                                 .after_step = after_step.value_or(nullptr),
                                                 .on_error = on_error.value_or(nullptr),
                                                 .deliver = with_gil});
          },
          "engine"_a, nb::kw_only(), "before_step"_a = nb::none(), "after_step"_a = nb::none(),
          "on_error"_a = nb::none(), nb::keep_alive<1, 2>())
      .def(
          "submit",
          [](PythonEngineLoop& self, Request request, EngineLoop::Callback callback) {
            return (*self).submit(std::move(request), std::move(callback));
          },
          "request"_a, "callback"_a, WithoutGil())
      .def(
          "cancel",
          [](PythonEngineLoop& self, RequestId id, std::optional<int64_t> branch) {
            return (*self).cancel(id, branch);
          },
          "request_id"_a, "branch"_a = nb::none(), WithoutGil())
      .def(
          "drain",
          [](PythonEngineLoop& self, std::optional<double> limit) {
            if (!limit) return (*self).drain();
            (*self).drain(std::chrono::milliseconds(static_cast<int64_t>(*limit * 1000)));
          },
          "limit"_a = nb::none(), WithoutGil())
      .def(
          "stop", [](PythonEngineLoop& self) { (*self).stop(); }, WithoutGil())
      .def_prop_ro(
          "counters", [](PythonEngineLoop& self) { return (*self).counters(); }, WithoutGil())
      .def_prop_ro(
          "num_requests", [](PythonEngineLoop& self) { return (*self).num_requests(); }, WithoutGil())
      .def_prop_ro("is_own_thread", [](PythonEngineLoop& self) { return (*self).is_own_thread(); });
}

}  // namespace xgdn
