// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_grammar.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>

#include "bindings/torch_casters.h"
#include "core/errors.h"

namespace nb = nanobind;

namespace xgdn {
namespace {

// Runs f with the GIL; what Python raises becomes an error with its message.
template <class F>
auto with_gil(const F& f) {
  const nb::gil_scoped_acquire gil;
  if (!gil.is_valid()) throw GenerationError("the interpreter has ended");
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
              const nb::gil_scoped_acquire gil;
              if (gil.is_valid()) delete owned;
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

PythonGrammar::PythonGrammar(nb::object grammar) : grammar_(shared(std::move(grammar))) {}

std::unique_ptr<TokenMatcher> PythonGrammar::matcher() const {
  return with_gil([&] { return std::make_unique<PythonMatcher>(shared(grammar_->attr("matcher")())); });
}

}  // namespace xgdn
