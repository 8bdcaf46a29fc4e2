// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sampling_params.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>

#include "core/errors.h"

namespace xgdn {
namespace {

constexpr double kLargestPenalty = 2.0;
constexpr float kLargestBias = 100.0f;
constexpr double kLeastRepetition = 0.01;  // much less makes logits infinite
constexpr double kMostRepetition = 100.0;

[[noreturn]] void refuse(const char* name, const char* expected, double got) {
  throw RequestError(c10::str("[SamplingParams] ", name, ": expected ", expected, ", got ", got));
}

}  // namespace

void SamplingParams::check() const {
  if (!(temperature >= 0.0) || std::isinf(temperature)) refuse("temperature", "a finite number >= 0", temperature);
  if (top_k < 0) refuse("top_k", "0 for all tokens, or a count", static_cast<double>(top_k));
  if (logprobs && (*logprobs < 0 || *logprobs > kMostLogprobs)) {
    refuse("logprobs", "a count 0..20", static_cast<double>(*logprobs));
  }
  if (!(top_p > 0.0 && top_p <= 1.0)) refuse("top_p", "a share in (0, 1]", top_p);
  if (!(min_p >= 0.0 && min_p <= 1.0)) refuse("min_p", "a share in [0, 1]", min_p);
  for (const auto& [name, penalty] :
       {std::pair{"presence_penalty", presence_penalty}, std::pair{"frequency_penalty", frequency_penalty}}) {
    if (!(std::abs(penalty) <= kLargestPenalty)) refuse(name, "a number -2..2", penalty);
  }
  if (!(repetition_penalty >= kLeastRepetition && repetition_penalty <= kMostRepetition)) {
    refuse("repetition_penalty", "a number 0.01..100", repetition_penalty);
  }
  if (min_tokens < 0) refuse("min_tokens", "a count", static_cast<double>(min_tokens));
  for (const TokenBias& it : logit_bias) {
    if (!(std::abs(it.bias) <= kLargestBias)) refuse("logit_bias", "numbers -100..100", it.bias);
  }
  if (std::ranges::any_of(bad_words, [](const auto& word) { return word.empty(); })) {
    refuse("bad_words", "at least one token in each", 0);
  }
}

}  // namespace xgdn
