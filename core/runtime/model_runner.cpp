// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/model_runner.h"

#include <ATen/Parallel.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace xgdn {
namespace {

// Whether the largest logit says it all.
bool is_greedy(const SamplingParams& params) {
  return params.temperature == 0.0 && !params.logprobs;
}

}  // namespace

ModelRunner::ModelRunner(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states,
                         KvCache& kv)
    : model_(std::move(model)),
      builder_(batch_limits(*model_, options), model_->device()),
      state_{states.layers(), kv.layers()},
      has_graphs_(kernel::has_graphs(model_->device())),
      finds_largest_(kernel::finds_largest_logits(model_->device())) {}

void ModelRunner::launch(const std::vector<SequenceStep>& sequences) {
  result_ = {};
  built_ = {};
  built_ = builder_.build(sequences);
  since_launch_ = Stopwatch();
  result_ = can_be_recorded() ? run_recorded() : forward(built_.input);
}

ModelRunner::Result ModelRunner::forward(const StepInput& input) {
  const kernel::StepMemory::Use use(memory_);
  Result result{.logits = model_->forward(input, state_)};
  if (finds_largest_) result.largest = kernel::largest_logits(result.logits);
  return result;
}

// Sequences that go on from another's state have write slots beside those that they read, which other steps lack.
bool ModelRunner::can_be_recorded() const {
  const std::vector<Segment>& segments = built_.input.gdn.segments;
  if (!has_graphs_ || segments.size() != 1 || segments.front().kind != SegmentKind::kDecode) return false;
  return !segments.front().state_slots.write && !segments.front().conv_slots.write;
}

// The graph of a step has logits for the padding too, so that it serves any number of sequences up to its rows.
ModelRunner::Result ModelRunner::run_recorded() {
  const int64_t num_rows = built_.input.gdn.num_tokens;
  if (recorded_at_ != built_.input.token_ids.const_data_ptr()) recorded_.clear();
  recorded_at_ = built_.input.token_ids.const_data_ptr();
  const auto [entry, is_new] = recorded_.try_emplace(num_rows);
  if (is_new) return forward(built_.input);
  RecordedStep& step = entry->second;
  if (!step.graph) {
    StepInput input = built_.input;
    input.logit_rows = at::Tensor();
    step.graph = kernel::record(model_->device(), [&] { step.result = forward(input); });
  }
  step.graph->replay();
  return step.result;
}

void ModelRunner::wait() {
  at::Tensor& awaited = finds_largest_ ? result_.largest.values : result_.logits;
  awaited = awaited.to(at::kCPU).contiguous();
  if (finds_largest_) result_.largest.tokens = result_.largest.tokens.to(at::kCPU);
  forward_seconds_ = since_launch_.seconds();
}

size_t ModelRunner::row_of(size_t sequence) const {
  const int64_t row = built_.logit_rows.at(sequence);
  if (row < 0) throw std::out_of_range("[ModelRunner] sample: a sequence without logits");
  return static_cast<size_t>(row);
}

// The logits that are read on the host, and which of their rows each of `rows` reads; -1: none.
at::Tensor ModelRunner::logits_on_host(const std::vector<SampleRow>& rows, std::vector<int64_t>& places) const {
  if (!finds_largest_) {
    for (const SampleRow& row : rows) places.push_back(static_cast<int64_t>(row_of(row.sequence)));
    return result_.logits;
  }
  std::vector<int64_t> wanted;
  for (const SampleRow& row : rows) {
    const auto index = static_cast<int64_t>(row_of(row.sequence));
    if (is_greedy(row.sampler->params())) {
      places.push_back(-1);
      continue;
    }
    places.push_back(std::ssize(wanted));
    wanted.push_back(index);
  }
  if (wanted.empty()) return {};
  const at::Tensor indices = at::tensor(wanted, at::kLong).to(result_.logits.device());
  return at::index_select(result_.logits, 0, indices).to(at::kCPU);
}

std::vector<SampledToken> ModelRunner::sample(const std::vector<SampleRow>& rows) const {
  std::vector<SampledToken> sampled(rows.size());
  std::vector<int64_t> places;
  const at::Tensor on_host = logits_on_host(rows, places);
  const auto choose = [&](size_t i) {
    if (places[i] < 0) {
      const auto row = static_cast<int64_t>(row_of(rows[i].sequence));
      const int64_t token = result_.largest.tokens.const_data_ptr<int64_t>()[row];
      check_largest_logit(result_.largest.values.const_data_ptr<float>()[row], token);
      sampled[i].token = static_cast<int32_t>(token);
      return;
    }
    const int64_t vocab = on_host.size(1);
    const std::span<const float> logits{on_host.const_data_ptr<float>() + places[i] * vocab,
                                        static_cast<size_t>(vocab)};
    const std::optional<int64_t> num_top = rows[i].sampler->params().logprobs;
    sampled[i].token = rows[i].sampler->sample(logits);
    if (num_top) sampled[i].logprobs = logprobs(logits, sampled[i].token, *num_top);
  };
  at::parallel_for(0, std::ssize(rows), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      try {
        choose(i);
      } catch (const NumericsError& error) {
        sampled[i].error = error.what();
      }
    }
  });
  return sampled;
}

}  // namespace xgdn
