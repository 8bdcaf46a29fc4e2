// SPDX-License-Identifier: Apache-2.0
// Passes over logits on the host, of which the choice of a token is made. Each takes a piece of a row, of any length
// and alignment, and works on one thread.
#pragma once

#include <cstdint>
#include <span>

namespace xgdn::kernel {

/// The largest of them; NaN where one of them is NaN. Fetches the `next` logits into the cache meanwhile.
float largest_logit(std::span<const float> logits, std::span<const float> next);

/// How many are `least`, which is finite, or larger.
int64_t count_logits(std::span<const float> logits, float least);

/// The weight of a logit x: exp((x - largest) rate) if x >= least, else 0.
struct LogitWeights {
  float least;    // finite
  float largest;  // finite, of the row
  double rate;    // 1 / temperature, such that f32 holds it as a normal number
};

/// Their weights, to some 1e-6 of each; those below 1e-37 are 0. `weights` is as long as `logits`.
void weigh_logits(std::span<const float> logits, const LogitWeights& by, std::span<float> weights);

/// Sum of these weights, to some 1e-6 of it. Its rounding depends on the width of the processor's vectors.
float sum_weights(std::span<const float> logits, const LogitWeights& by);

/// Sum of the weights in double: to some 1e-15 of each.
double sum_weights_in_double(std::span<const float> logits, const LogitWeights& by);

/// Makes -infinity of each logit whose bit is not set. Logit i has bit i % 32 of word i / 32; there is a word for each.
void forbid_logits(std::span<const uint32_t> allowed, std::span<float> logits);

}  // namespace xgdn::kernel
