// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/model_runner.h"

#include <ATen/Parallel.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace xgdn {
namespace {

// Rows of hidden states whose logits are on the host at once: a prompt's would be larger than the model.
constexpr int64_t kLogitBlock = 64;

std::span<const float> row_of(const at::Tensor& logits, int64_t row) {
  const int64_t vocab = logits.size(1);
  return {logits.const_data_ptr<float>() + row * vocab, static_cast<size_t>(vocab)};
}

}  // namespace

ModelRunner::ModelRunner(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states,
                         KvCache& kv, ProcessGroup* ranks, Leader* leader)
    : model_(std::move(model)),
      ranks_(ranks),
      leader_(leader),
      builder_(batch_limits(*model_, options), model_->device()),
      state_{states.layers(), kv.layers()},
      has_graphs_(ranks == nullptr && kernel::has_graphs(model_->device())),
      finds_largest_(ranks == nullptr &&
                     (kernel::finds_largest_logits(model_->device()) || runs_ahead(*model_, options))) {}

void ModelRunner::launch(const std::vector<SequenceStep>& sequences) {
  ahead_.reset();
  step_ = {};
  step_.built = builder_.build(sequences);
  if (ranks_ == nullptr) {
    start(step_, sequences);
    return;
  }
  step_.since_start = Stopwatch();
  const auto compute = [&] {
    step_.result = forward(step_.built.input);
    step_.wanted.emplace(step_.result.logits, needs_of_rows(step_, sequences), ranks_);
    if (leader_ != nullptr) step_.wanted->to_host();  // what an exchange throws ends all ranks
  };
  leader_ == nullptr ? compute() : leader_->exchange(StepCommand{sequences}, compute);
}

void ModelRunner::start(Step& step, const std::vector<SequenceStep>& sequences) {
  step.since_start = Stopwatch();
  const StepInput& input = step.built.input;
  step.result = can_be_recorded(input) ? run_recorded(input) : forward(input);
  if (!finds_largest_) return;
  step.largest = HostCopy(step.result.largest.packed);
  const std::vector<int64_t> needs = needs_of_rows(step, sequences);
  if (std::ranges::all_of(needs, [](int64_t need) { return need == kNotWanted; })) return;
  step.wanted.emplace(step.result.logits, needs, /*group=*/nullptr);
  step.wanted->start_to_host();
}

// The tokens never leave the device. Sequences that were neighbours in the last step have theirs copied at once.
void ModelRunner::launch_ahead(const std::vector<SequenceStep>& sequences, const std::vector<size_t>& behind) {
  Step ahead{.built = builder_.build(sequences)};
  const at::Tensor chosen = step_.result.largest.tokens();
  const at::Tensor& tokens = ahead.built.input.token_ids;
  const auto count = std::ssize(behind);
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const int64_t first = first_row(behind[static_cast<size_t>(begin)]);
    do {
      ++end;
    } while (end < count && first_row(behind[static_cast<size_t>(end)]) == first + end - begin);
    tokens.narrow(0, begin, end - begin).copy_(chosen.narrow(0, first, end - begin), /*non_blocking=*/true);
  }
  start(ahead, sequences);
  ahead_ = std::move(ahead);
}

void ModelRunner::take_ahead() {
  step_ = *std::exchange(ahead_, std::nullopt);
  step_.since_start = Stopwatch();
}

// Of each row of the logits, as WantedLogits has them.
std::vector<int64_t> ModelRunner::needs_of_rows(const Step& step, const std::vector<SequenceStep>& sequences) const {
  std::vector<int64_t> needs(static_cast<size_t>(step.result.logits.size(0)), kNotWanted);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const SequenceStep& s = sequences[i];
    if (!s.wants_logits || (finds_largest_ && s.num_candidates == 1)) continue;
    const int64_t count = s.kind == SegmentKind::kVerify ? std::ssize(s.tokens) : 1;
    std::fill_n(needs.begin() + step.built.logit_rows[i], count, s.num_candidates);
  }
  return needs;
}

ModelRunner::Result ModelRunner::forward(const StepInput& input) {
  const kernel::StepMemory::Use use(memory_);
  StepOutput output = model_->forward(input, state_);
  Result result{.logits = std::move(output.logits),
                .hidden = std::move(output.hidden),
                .all_hidden = std::move(output.all_hidden)};
  if (finds_largest_) result.largest = kernel::largest_logits(result.logits);
  return result;
}

// Sequences that go on from another's state have write slots beside those that they read, which other steps lack.
bool ModelRunner::can_be_recorded(const StepInput& input) const {
  const std::vector<Segment>& segments = input.gdn.segments;
  if (!has_graphs_ || segments.size() != 1 || segments.front().kind != SegmentKind::kDecode) return false;
  return !segments.front().state_slots.write && !segments.front().conv_slots.write;
}

// The graph of a step has logits for the padding too, so that it serves any number of sequences up to its rows.
ModelRunner::Result ModelRunner::run_recorded(const StepInput& input) {
  const int64_t num_rows = input.gdn.num_tokens;
  if (recorded_at_ != input.token_ids.const_data_ptr()) recorded_.clear();
  recorded_at_ = input.token_ids.const_data_ptr();
  const auto [entry, is_new] = recorded_.try_emplace(num_rows);
  if (is_new) return forward(input);
  RecordedStep& step = entry->second;
  if (!step.graph) {
    StepInput all_rows = input;
    all_rows.logit_rows = at::Tensor();
    step.graph = kernel::record(model_->device(), [&] { step.result = forward(all_rows); });
  }
  step.graph->replay();
  return step.result;
}

void ModelRunner::wait() {
  Result& result = step_.result;
  if (result.hidden.defined()) result.hidden_sums = at::sum(result.hidden, 1, /*keepdim=*/false, at::kFloat).cpu();
  if (finds_largest_) {
    const kernel::LargestLogits largest{step_.largest.wait()};
    step_.tokens = largest.tokens();
    step_.values = largest.values();
    if (step_.wanted) step_.wanted->to_host();
  } else if (ranks_ == nullptr) {
    result.logits = result.logits.to(at::kCPU).contiguous();
  }
  forward_seconds_ = step_.since_start.seconds();
}

// The first of them.
int64_t ModelRunner::first_row(size_t sequence) const {
  const int64_t row = step_.built.logit_rows.at(sequence);
  if (row < 0) throw std::out_of_range("[ModelRunner] sample: a sequence without logits");
  return row;
}

// The next token of a row of all logits.
SampledToken ModelRunner::choose(Sampler& sampler, int64_t row) const {
  try {
    if (finds_largest_ && !(step_.wanted && step_.wanted->has(row))) {
      const int32_t token = step_.tokens.const_data_ptr<int32_t>()[row];
      check_largest_logit(step_.values.const_data_ptr<float>()[row], token);
      return {.token = token};
    }
    if (!step_.wanted) return choose_from(sampler, row_of(step_.result.logits, row));
    if (sampler.is_greedy()) return {.token = step_.wanted->largest(row)};
    thread_local std::vector<float> with_candidates;  // of the size of a vocabulary: not allocated for every token
    return choose_from(sampler, step_.wanted->row(row, with_candidates));
  } catch (const NumericsError& error) {
    return {.error = error.what(), .is_spoilt = true};
  } catch (const Error& error) {
    return {.error = error.what()};
  }
}

SampledToken ModelRunner::choose_from(Sampler& sampler, std::span<const float> logits) {
  SampledToken sampled{.token = sampler.sample(logits)};
  if (const auto num_top = sampler.params().logprobs) sampled.logprobs = logprobs(logits, sampled.token, *num_top);
  return sampled;
}

std::vector<std::vector<SampledToken>> ModelRunner::sample(const std::vector<SampleRow>& rows) const {
  std::vector<std::vector<SampledToken>> sampled(rows.size());
  // Rows differ in what they cost: a thread takes one after the other.
  std::atomic<size_t> next = 0;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::ssize(rows));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < rows.size();) {
      const auto& [sequence, sampler, drafts] = rows[i];
      for (size_t draft = 0; draft <= drafts.size(); ++draft) {
        const auto offset = static_cast<int64_t>(draft);
        sampled[i].push_back(choose(*sampler, first_row(sequence) + offset));
        const SampledToken& last = sampled[i].back();
        if (last.error || draft == drafts.size() || last.token != drafts[draft]) break;
        sampler->accept({&last.token, 1});
      }
    }
  });
  return sampled;
}

std::vector<Logprobs> ModelRunner::logprobs_of(size_t sequence, std::span<const int32_t> tokens, int64_t num_top) {
  const int64_t first = step_.built.hidden_rows.at(sequence);
  std::vector<Logprobs> found;
  for (int64_t begin = 0; begin < std::ssize(tokens); begin += kLogitBlock) {
    const int64_t count = std::min(std::ssize(tokens) - begin, kLogitBlock);
    const auto compute = [&] { return hidden_logits(first + begin, count).to(at::kCPU).contiguous(); };
    const Stopwatch in_model;
    const at::Tensor logits =
        leader_ == nullptr ? compute() : leader_->exchange(LogitsCommand{first + begin, count}, compute);
    forward_seconds_ += in_model.seconds();
    found.resize(static_cast<size_t>(begin + count));
    at::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const auto token = static_cast<size_t>(begin + i);
        found[token] = logprobs(row_of(logits, i), tokens[token], num_top);
      }
    });
  }
  return found;
}

at::Tensor ModelRunner::hidden_logits(int64_t first, int64_t count) const {
  const at::Tensor local = model_->logits(step_.result.hidden.narrow(0, first, count));
  return ranks_ == nullptr ? local : gather_logits(local, *ranks_);
}

// Behind the last norm, so that the sum of finite ones is finite.
bool ModelRunner::has_finite_state(size_t sequence, int64_t num_hidden) const {
  const int64_t last = step_.built.hidden_rows.at(sequence) + num_hidden - 1;
  return std::isfinite(step_.result.hidden_sums.const_data_ptr<float>()[last]);
}

std::vector<float> ModelRunner::last_hidden(size_t sequence, int64_t num_hidden) const {
  const at::Tensor row = step_.result.hidden.select(0, step_.built.hidden_rows.at(sequence) + num_hidden - 1);
  const at::Tensor on_host = row.to(at::kCPU, at::kFloat).contiguous();
  return {on_host.const_data_ptr<float>(), on_host.const_data_ptr<float>() + on_host.numel()};
}

}  // namespace xgdn
