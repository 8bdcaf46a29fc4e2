// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/selection.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>

#include "core/kernels/aten/likeliest_logits.h"

namespace xgdn::kernel {
namespace {

struct DefaultBackends {
  std::mutex mutex;
  std::array<std::string, 2> name;

  DefaultBackends() {
    const auto from_environment = [](const char* variable) {
      const char* value = std::getenv(variable);
      return std::string(value != nullptr && *value != '\0' ? value : "auto");
    };
    name = {from_environment("XGDN_PREFILL_BACKEND"), from_environment("XGDN_DECODE_BACKEND")};
  }
};

DefaultBackends& defaults() {
  static DefaultBackends instance;
  return instance;
}

struct LastCall {
  const Backend* backend = nullptr;  // null before the first
  bool is_batch_invariant = false;
};

template <class... Params>
std::optional<LastCall> last_of(std::string_view op, OpList<Params...>) {
  std::optional<LastCall> found;
  ((Op<Params>::name == op ? void(found = {last_used<Params>.load(std::memory_order_relaxed),
                                           last_was_invariant<Params>.load(std::memory_order_relaxed)})
                           : void()),
   ...);
  return found;
}

template <class... Params>
std::string op_names(OpList<Params...>) {
  return c10::Join(", ", std::array{Op<Params>::name...});
}

LastCall last_call(std::string_view function, std::string_view op) {
  const std::optional<LastCall> found = last_of(op, AllOps{});
  if (found) return *found;
  throw UnsupportedError(c10::str("[", function, "] op: expected one of ", op_names(AllOps{}), ", got '", op, "'"));
}

// The first that serves the device and says yes; null: none.
const Backend* backend_that(bool (Backend::*says)() const, c10::Device device) {
  const auto found =
      std::ranges::find_if(backends(), [&](const Backend* b) { return (b->*says)() && !b->why_not_device(device); });
  return found == backends().end() ? nullptr : *found;
}

}  // namespace

const Backend* find_backend(std::string_view name) {
  for (const Backend* b : backends()) {
    if (b->name() == name) return b;
  }
  return nullptr;
}

std::string absence(std::string_view context, std::string_view name) {
  for (const AbsentBackend& absent : absent_backends()) {
    if (absent.name == name) return absent.why;
  }
  throw UnsupportedError(c10::str("[", context, "] backend: expected auto or one of ",
                                  c10::Join(", ", available_backends()), ", got '", name, "'"));
}

void check_backend_name(const std::string& name) {
  if (name == "auto" || find_backend(name) != nullptr) return;
  throw UnsupportedError(c10::str("backend ", name, ": ", absence("backend", name)));
}

void set_default_backend(Phase phase, const std::string& name) {
  check_backend_name(name);
  std::lock_guard lock(defaults().mutex);
  defaults().name[static_cast<size_t>(phase)] = name;
}

std::string default_backend(Phase phase) {
  std::lock_guard lock(defaults().mutex);
  return defaults().name[static_cast<size_t>(phase)];
}

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const Backend* b : backends()) {
    if (!b->why_unavailable()) names.emplace_back(b->name());
  }
  return names;
}

bool reads_context_rows(c10::Device device) {
  return backend_that(&Backend::reads_context_rows, device) != nullptr;
}

bool has_graphs(c10::Device device) {
  return backend_that(&Backend::has_graphs, device) != nullptr;
}

std::unique_ptr<DeviceGraph> record(c10::Device device, const std::function<void()>& launches) {
  const Backend* backend = backend_that(&Backend::has_graphs, device);
  return backend != nullptr ? backend->record(launches) : nullptr;
}

bool finds_largest_logits(c10::Device device) {
  return backend_that(&Backend::finds_largest_logits, device) != nullptr;
}

LargestLogits largest_logits(const at::Tensor& logits) {
  const Backend* backend = backend_that(&Backend::finds_largest_logits, logits.device());
  return backend != nullptr ? backend->largest_logits(logits) : aten::largest_logits(logits);
}

at::Tensor likeliest_logits(const at::Tensor& logits, int64_t count) {
  const Backend* backend = backend_that(&Backend::finds_largest_logits, logits.device());
  return backend != nullptr ? backend->likeliest_logits(logits, count) : aten::likeliest_logits(logits, count);
}

bool copies_contexts(c10::Device device, const std::string& backend) {
  const std::string name = backend == "auto" ? default_backend(Op<PagedAttentionParams>::phase) : backend;
  const auto serves = [&](const Backend* b) {
    return (name == "auto" || b->name() == name) && !b->why_not_device(device);
  };
  const auto found = std::ranges::find_if(backends(), serves);
  return found == backends().end() || (*found)->copies_contexts();
}

std::string last_backend(std::string_view op) {
  const Backend* backend = last_call("last_backend", op).backend;
  return backend != nullptr ? std::string(backend->name()) : "";
}

bool last_is_batch_invariant(std::string_view op) {
  return last_call("last_is_batch_invariant", op).is_batch_invariant;
}

}  // namespace xgdn::kernel
