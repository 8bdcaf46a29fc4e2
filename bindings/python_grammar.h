// SPDX-License-Identifier: Apache-2.0
// A grammar whose matchers are Python objects.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <span>
#include <vector>

#include "core/runtime/grammar.h"

namespace xgdn {

/// Lets no matcher take the GIL once the interpreter ends: called as the module is loaded.
void end_grammars_at_exit();

/// An object with `matcher()`, whose result has `write_mask(mask)`, `accept(tokens)` and `forced()`, as TokenMatcher:
/// `mask` is an int32 tensor [ceil(vocab / 32)]. What they raise ends the sequence with their message.
class PythonGrammar : public Grammar {
 public:
  explicit PythonGrammar(nanobind::object grammar);
  std::unique_ptr<TokenMatcher> matcher() const override;

  const nanobind::object& object() const { return *grammar_; }

 private:
  std::shared_ptr<nanobind::object> grammar_;  // destroyed with the GIL
};

}  // namespace xgdn
