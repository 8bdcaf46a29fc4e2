// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_grammar.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>

#include "bindings/torch_casters.h"
#include "core/errors.h"

namespace nb = nanobind;

namespace xgdn {
namespace {

// The interpreter, for threads that are not its own: one that waits for the GIL when the interpreter is finalized would
// be ended in the middle of C++, and the process with it.
class Interpreter {
 public:
  // False once it ends. Whoever gets true takes the GIL, and calls leave() without it.
  bool enter() {
    const std::lock_guard lock(mutex_);
    if (has_ended_) return false;
    ++num_inside_;
    return true;
  }
  void leave() {
    {
      const std::lock_guard lock(mutex_);
      --num_inside_;
    }
    left_.notify_all();
  }
  // Lets nobody in any more, and waits for those inside. Without the GIL.
  void end() {
    std::unique_lock lock(mutex_);
    has_ended_ = true;
    left_.wait(lock, [&] { return num_inside_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable left_;
  int num_inside_ = 0;
  bool has_ended_ = false;
};

Interpreter& interpreter() {
  static auto* const interpreter = new Interpreter;  // inter-op threads outlive what is static
  return *interpreter;
}

// Keeps the interpreter from ending, unless it has begun to: then false. Outlives the GIL that is taken inside.
class Inside {
 public:
  Inside() : is_inside_(interpreter().enter()) {}
  ~Inside() {
    if (is_inside_) interpreter().leave();
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

  explicit operator bool() const { return is_inside_; }

 private:
  const bool is_inside_;
};

// Runs f with the GIL; what Python raises becomes an error with its message.
template <class F>
auto with_gil(const F& f) {
  const Inside inside;
  if (!inside) throw GenerationError("the interpreter has ended");
  const nb::gil_scoped_acquire gil;
  try {
    return f();
  } catch (nb::python_error& error) {
    std::string message = nb::cast<std::string>(nb::str(error.value()));
    throw GenerationError(std::move(message));
  }
}

// Whoever lets go of it may hold locks that a thread with the GIL waits for: the GIL is taken by another thread.
std::shared_ptr<nb::object> shared(nb::object object) {
  return {new nb::object(std::move(object)), [](nb::object* owned) {
            at::launch([owned] {
              const Inside inside;
              if (!inside) return;
              const nb::gil_scoped_acquire gil;
              delete owned;
            });
          }};
}

class PythonMatcher : public TokenMatcher {
 public:
  explicit PythonMatcher(std::shared_ptr<nb::object> matcher) : matcher_(std::move(matcher)) {}

  void write_mask(std::span<uint32_t> mask) override {
    with_gil([&] { matcher_->attr("write_mask")(at::from_blob(mask.data(), {std::ssize(mask)}, at::kInt)); });
  }
  void accept(std::span<const int32_t> tokens) override {
    with_gil([&] { matcher_->attr("accept")(std::vector(tokens.begin(), tokens.end())); });
  }
  std::vector<int32_t> forced() override {
    return with_gil([&] { return nb::cast<std::vector<int32_t>>(matcher_->attr("forced")()); });
  }

 private:
  std::shared_ptr<nb::object> matcher_;
};

}  // namespace

void end_grammars_at_exit() {
  const auto end = [] {
    const nb::gil_scoped_release release;
    interpreter().end();
  };
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(end));
}

PythonGrammar::PythonGrammar(nb::object grammar) : grammar_(shared(std::move(grammar))) {}

std::unique_ptr<TokenMatcher> PythonGrammar::matcher() const {
  return with_gil([&] { return std::make_unique<PythonMatcher>(shared(grammar_->attr("matcher")())); });
}

}  // namespace xgdn
