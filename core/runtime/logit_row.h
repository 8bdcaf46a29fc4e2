// SPDX-License-Identifier: Apache-2.0
// One row of logits, in the order of likelihood: larger ones first, equal ones by token id.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

namespace xgdn {

/// Throws NumericsError unless `logit`, the largest of a row or one of its NaNs, is finite.
void check_largest_logit(float logit, int64_t token);

/// A token of a row, and its logit.
struct TokenLogit {
  float logit;
  int64_t token;
};

/// Whether x comes before y in the order of likelihood. NaNs come first.
inline bool is_likelier(const TokenLogit& x, const TokenLogit& y) {
  if (x.logit > y.logit) return true;
  if (x.logit < y.logit) return false;
  if (std::isnan(x.logit) != std::isnan(y.logit)) return std::isnan(x.logit);
  return x.token < y.token;
}

/// The likeliest tokens of a row down to one of them: those with a logit above `least`, and of those equal to it the
/// ones before token `end`. Of two such sets one holds the other.
struct LikeliestTokens {
  float least;
  int64_t end;
};

/// The smaller of two sets.
LikeliestTokens smaller(const LikeliestTokens& a, const LikeliestTokens& b);

/// Reads logits that outlive it, block by block, and knows the largest of each block, so that what looks for likely
/// tokens reads few of them. Threads share the first reading of a row that one thread asks for alone.
class LogitRow {
 public:
  /// Throws NumericsError when a logit is NaN or the largest is not finite.
  explicit LogitRow(std::span<const float> logits);

  /// The row.
  std::span<const float> logits() const { return logits_; }
  /// Its largest logit.
  float largest() const { return largest_; }

  /// The likeliest token.
  int32_t best() const;

  /// The `count` likeliest tokens, at least 1; all where there are no more.
  LikeliestTokens likeliest(int64_t count) const;

  /// Those whose probability at this temperature (> 0) is at least this share (0..1) of the best one's; for 0 all whose
  /// logits are finite. Rounds as exp in double does.
  LikeliestTokens with_share(double share, double temperature) const;

  /// Those that are likelier than `token`.
  LikeliestTokens likelier_than(int32_t token) const;

  /// The tokens themselves, the likeliest first.
  std::vector<int32_t> list(const LikeliestTokens& tokens) const;

  /// Their weights exp((logit - largest) / temperature), summed block by block to some 1e-6 of each sum. Of `tokens`
  /// with finite logits.
  std::vector<double> block_sums(const LikeliestTokens& tokens, double temperature) const;

  /// Sum of the same weights, to some 1e-15 of each.
  double sum(const LikeliestTokens& tokens, double temperature) const;

  /// The first token of a block, in the order of ids, behind which the sum of the block's weights exceeds `target`;
  /// else the last that has a weight.
  int32_t first_beyond(double target, int64_t block, const LikeliestTokens& tokens, double temperature) const;

 private:
  int64_t num_blocks() const { return static_cast<int64_t>(maxima_.size()); }
  std::span<const float> block(int64_t index) const;
  template <class F>
  void for_each_part(int64_t block, const LikeliestTokens& tokens, const F& f) const;
  int64_t count(float least, int64_t most) const;

  std::span<const float> logits_;
  std::vector<float> maxima_;  // of the blocks
  float largest_ = 0.0f;
};

}  // namespace xgdn
