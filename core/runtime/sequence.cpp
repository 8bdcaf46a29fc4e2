// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sequence.h"

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

}  // namespace xgdn
