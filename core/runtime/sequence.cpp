// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sequence.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

namespace xgdn {
namespace {

SamplingParams with_seed_of(SamplingParams params, int64_t branch) {
  params.seed += static_cast<uint64_t>(branch);
  return params;
}

LogitRules rules_of(const Request& request, const std::vector<int32_t>& stop_tokens, int64_t vocab_size) {
  auto masks = request.grammar ? std::make_shared<GrammarMasks>(request.grammar, vocab_size) : nullptr;
  return LogitRules(request.sampling, request.prompt, stop_tokens, std::move(masks));
}

}  // namespace

Sequence::Sequence(RequestId request_id, std::shared_ptr<const Request> r, int64_t branch_idx,
                   std::vector<int32_t> stops, int64_t vocab_size)
    : id(request_id),
      request(std::move(r)),
      branch(branch_idx),
      stop_tokens(std::move(stops)),
      sampler(with_seed_of(request->sampling, branch), rules_of(*request, stop_tokens, vocab_size)),
      tokens(request->prompt),
      prefill_end(prompt_size()) {}

void Sequence::truncate(int64_t num_tokens) {
  if (num_tokens < prompt_size() || num_tokens > this->num_tokens()) {
    throw RangeError(c10::str("[Sequence] truncate: expected ", prompt_size(), "..", this->num_tokens(),
                              " tokens, got ", num_tokens));
  }
  tokens.resize(static_cast<size_t>(num_tokens));
  drafts.clear();
  memory.truncate(num_tokens - 1);
  if (num_computed() == 0) num_uncommitted = 0;
  prefill_end = num_computed() == 0 ? num_tokens : std::min(prefill_end, num_tokens);
}

}  // namespace xgdn
