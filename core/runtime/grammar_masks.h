// SPDX-License-Identifier: Apache-2.0
// The masks of one sequence's grammar, computed while the model computes the step before them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/runtime/grammar.h"

namespace xgdn {

/// Runs a matcher on torch's inter-op threads. For one thread at a time.
class GrammarMasks {
 public:
  /// Begins to compute the first mask.
  GrammarMasks(std::shared_ptr<const Grammar> grammar, int64_t vocab_size);
  ~GrammarMasks();
  GrammarMasks(const GrammarMasks&) = delete;
  GrammarMasks& operator=(const GrammarMasks&) = delete;

  /// What may follow, as TokenMatcher has it.
  struct Next {
    std::span<const uint32_t> mask;
    std::span<const int32_t> forced;
  };

  /// Waits for what has begun. Holds until the next accept(). Throws GenerationError with what the matcher threw, from
  /// then on at every call.
  Next next() const;

  /// Takes the tokens that came after next(), and begins to compute the mask behind them.
  void accept(std::vector<int32_t> tokens);

 private:
  struct Shared;
  static void run(const std::shared_ptr<Shared>& shared, const std::vector<int32_t>& tokens);
  void launch(std::vector<int32_t> tokens);

  std::shared_ptr<Shared> shared_;  // with the job under way, which may outlive this
};

}  // namespace xgdn
