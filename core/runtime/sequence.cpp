// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sequence.h"

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

std::vector<int32_t> Sequence::kv_blocks() const {
  std::vector<int32_t> blocks = prompt_kv->blocks;
  blocks.insert(blocks.end(), own_kv.blocks.begin(), own_kv.blocks.end());
  return blocks;
}

}  // namespace xgdn
