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

}  // namespace

Sequence::Sequence(RequestId request_id, std::shared_ptr<const Request> r, int64_t branch_idx)
    : id(request_id),
      request(std::move(r)),
      branch(branch_idx),
      sampler(with_seed_of(request->sampling, branch)),
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
