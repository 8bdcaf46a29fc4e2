// SPDX-License-Identifier: Apache-2.0
// What a host plugs in to say which tokens may come next: a JSON schema, a regular expression, any grammar.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace xgdn {

/// Where one sequence stands in a grammar. The engine calls it from threads beside the one that steps, one call after
/// the other; what it throws ends the sequence with that error.
class TokenMatcher {
 public:
  virtual ~TokenMatcher() = default;

  /// Writes which tokens may come next: bit i % 32 of word i / 32 for token i, of ceil(vocabulary / 32) words. Where
  /// the grammar may end, the tokens that end a reply are among them; where it must, there are no others.
  virtual void write_mask(std::span<uint32_t> mask) = 0;

  /// Takes tokens that came, in order; not the one that ends the reply.
  virtual void accept(std::span<const int32_t> tokens) = 0;

  /// The tokens that must come next, as far as there is only one way to go on; may be empty though there is one. One
  /// that is none of the vocabulary ends the sequence with an error.
  virtual std::vector<int32_t> forced() { return {}; }
};

/// A grammar, compiled for the vocabulary of a model. Any thread may call it.
class Grammar {
 public:
  virtual ~Grammar() = default;

  /// One that stands at the beginning.
  virtual std::unique_ptr<TokenMatcher> matcher() const = 0;
};

}  // namespace xgdn
