// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/logit_rules.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/errors.h"
#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

bool ends_with(std::span<const int32_t> tokens, std::span<const int32_t> end) {
  return tokens.size() >= end.size() && std::ranges::equal(tokens.last(end.size()), end);
}

}  // namespace

LogitRules::LogitRules(const SamplingParams& params, std::span<const int32_t> prompt, std::vector<int32_t> stop_tokens,
                       std::shared_ptr<GrammarMasks> masks)
    : params_(params), stop_tokens_(std::move(stop_tokens)), masks_(std::move(masks)) {
  has_penalties_ =
      params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
  is_empty_ = !has_penalties_ && !masks_ && params.logit_bias.empty() && params.bad_words.empty() &&
              (params.min_tokens == 0 || stop_tokens_.empty());
  if (params.repetition_penalty == 1.0) return;
  for (const int32_t token : prompt) counts_[token].is_in_prompt = true;
}

void LogitRules::apply(std::span<float> logits) const {
  if (masks_) kernel::forbid_logits(masks_->next().mask, logits);
  if (num_accepted_ < params_.min_tokens) {
    for (const int32_t token : stop_tokens_) {
      if (token >= 0 && static_cast<size_t>(token) < logits.size()) logits[token] = kForbidden;
    }
  }
  forbid_bad_words(logits);
  for (const TokenBias& it : params_.logit_bias) logits[it.token] += it.bias;
  penalize(logits);
  if (std::ranges::all_of(logits, [](float logit) { return logit == kForbidden; })) {
    throw GenerationError("[Sampler] expected a token that may follow, got none that the rules of the request allow");
  }
}

void LogitRules::forbid_bad_words(std::span<float> logits) const {
  for (const std::vector<int32_t>& word : params_.bad_words) {
    if (ends_with(reply_, std::span(word).first(word.size() - 1))) logits[word.back()] = kForbidden;
  }
}

void LogitRules::penalize(std::span<float> logits) const {
  for (const auto& [token, count] : counts_) {
    float& logit = logits[token];
    if (count.is_in_prompt || count.in_reply > 0) {
      const auto factor = static_cast<float>(params_.repetition_penalty);
      logit = logit > 0 ? logit / factor : logit * factor;
    }
    if (count.in_reply == 0) continue;
    logit -= static_cast<float>(params_.frequency_penalty * static_cast<double>(count.in_reply));
    logit -= static_cast<float>(params_.presence_penalty);
  }
}

std::span<const int32_t> LogitRules::forced() const {
  if (!masks_ || !params_.bad_words.empty()) return {};
  return masks_->next().forced;
}

void LogitRules::accept(std::span<const int32_t> tokens) {
  num_accepted_ += std::ssize(tokens);
  if (has_penalties_) {
    for (const int32_t token : tokens) ++counts_[token].in_reply;
  }
  if (!params_.bad_words.empty()) reply_.insert(reply_.end(), tokens.begin(), tokens.end());
  if (masks_) masks_->accept({tokens.begin(), tokens.end()});
}

}  // namespace xgdn
