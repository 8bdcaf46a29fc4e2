// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sequence_logits.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "core/runtime/batch_builder.h"
#include "core/runtime/runner_options.h"

namespace xgdn {

at::Tensor sequence_logits(const HybridDecoder& model, const std::vector<int32_t>& prompt,
                           const std::vector<int32_t>& continuation) {
  const c10::InferenceMode inference;
  const int64_t num_tokens = std::ssize(prompt) + std::ssize(continuation);
  const int64_t block_size = std::max<int64_t>(num_tokens, 1);
  StatePool states(model.state_specs(), /*num_slots=*/1, model.device());
  KvCache kv(kv_spec(model, block_size), /*num_blocks=*/1, model.device());
  BatchBuilder builder({.num_slots = 1,
                        .num_kv_blocks = 1,
                        .kv_block_size = block_size,
                        .vocab_size = model.config().vocab_size,
                        .has_attention = model.num_attention_layers() > 0,
                        .max_tokens = block_size},
                       model.device());
  ModelState state{states.layers(), kv.layers()};
  SequenceStep step{.kind = SegmentKind::kPrefill,
                    .tokens = prompt,
                    .state_slots = {0},
                    .write_slot = 0,
                    .conv_slot = 0,
                    .conv_write_slot = 0,
                    .has_initial_state = false,
                    .kv_blocks = {0}};
  BuiltStep built = builder.build({step});
  built.input.logit_rows = at::arange(std::ssize(prompt), built.input.logit_rows.options());
  std::vector<at::Tensor> logits{model.forward(built.input, state).logits};
  for (const int32_t token : continuation) {
    step.kind = SegmentKind::kDecode;
    step.num_cached += std::ssize(step.tokens);
    step.tokens = {token};
    step.has_initial_state = true;
    logits.push_back(model.forward(builder.build({step}).input, state).logits);
  }
  return logits.size() == 1 ? logits.front() : at::cat(logits);
}

}  // namespace xgdn
