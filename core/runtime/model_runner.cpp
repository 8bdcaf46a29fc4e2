// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/model_runner.h"

#include <ATen/Parallel.h>

#include <stdexcept>
#include <utility>

namespace xgdn {

ModelRunner::ModelRunner(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states,
                         KvCache& kv)
    : model_(std::move(model)),
      builder_(batch_limits(*model_, options), model_->device()),
      state_{states.layers(), kv.layers()} {}

void ModelRunner::launch(const std::vector<SequenceStep>& sequences) {
  logits_.reset();
  built_ = {};
  built_ = builder_.build(sequences);
  since_launch_ = Stopwatch();
  const kernel::StepMemory::Use use(memory_);
  logits_ = model_->forward(built_.input, state_);
}

void ModelRunner::wait() {
  logits_ = logits_.to(at::kCPU).contiguous();
  forward_seconds_ = since_launch_.seconds();
}

std::span<const float> ModelRunner::logits_of(size_t sequence) const {
  const int64_t row = built_.logit_rows.at(sequence);
  if (row < 0) throw std::out_of_range("[ModelRunner] sample: a sequence without logits");
  const int64_t vocab = logits_.size(1);
  return {logits_.const_data_ptr<float>() + row * vocab, static_cast<size_t>(vocab)};
}

std::vector<SampledToken> ModelRunner::sample(const std::vector<SampleRow>& rows) const {
  std::vector<SampledToken> sampled(rows.size());
  at::parallel_for(0, std::ssize(rows), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      const std::span<const float> logits = logits_of(rows[i].sequence);
      const std::optional<int64_t> num_top = rows[i].sampler->params().logprobs;
      try {
        sampled[i].token = rows[i].sampler->sample(logits);
        if (num_top) sampled[i].logprobs = logprobs(logits, sampled[i].token, *num_top);
      } catch (const NumericsError& error) {
        sampled[i].error = error.what();
      }
    }
  });
  return sampled;
}

}  // namespace xgdn
