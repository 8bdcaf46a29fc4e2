// SPDX-License-Identifier: Apache-2.0
// The device's side of a step: its buffers, the model's forward, the copy of the logits, and the choice of tokens.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/models/hybrid_decoder.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/host_copy.h"
#include "core/runtime/leader.h"
#include "core/runtime/logprobs.h"
#include "core/runtime/runner_options.h"
#include "core/runtime/sampler.h"
#include "core/runtime/stopwatch.h"
#include "core/runtime/wanted_logits.h"

namespace xgdn {

/// A sequence of a step to choose tokens for.
struct SampleRow {
  size_t sequence;                       // of those given to launch(), which wants logits; several may name the same
  Sampler* sampler;                      // of its own
  std::span<const int32_t> drafts = {};  // that the step has verified: a token is chosen behind each that was right
};

/// What was chosen.
struct SampledToken {
  int32_t token = -1;
  std::optional<Logprobs> logprobs;  // where the sampler's parameters ask for them
  std::optional<std::string> error;  // why no token could be chosen
  bool is_spoilt = false;            // with an error: the logits are not finite
};

/// Runs one step after the other over pools that outlive it, for one thread at a time. Streams, graphs and overlap
/// belong here: the engine above sees sequences and tokens.
///
/// Where the device has graphs, steps that only decode are recorded by their number of rows, the second time that there
/// are so many, and replayed from then on. Steps of several ranks are not: their exchanges are no part of a graph.
class ModelRunner {
 public:
  /// Makes the step buffers for the largest step of these options. `ranks`: of a model that several share, or null;
  /// `leader`: of rank 0 among them, which tells the others of every step. Both outlive the runner.
  ModelRunner(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states, KvCache& kv,
              ProcessGroup* ranks = nullptr, Leader* leader = nullptr);

  /// Packs a step and starts it on the device, on all ranks. It is the last step from then on, and one that was ahead
  /// is forgotten. Throws as BatchBuilder::build and HybridDecoder::forward, and RankError.
  void launch(const std::vector<SequenceStep>& sequences);

  /// Starts the step behind the last one before anybody knows the latter's tokens: `sequences`, which decode, go on
  /// from its sequences `behind` with the largest logits there, in the place of the tokens that they name. Of options
  /// that run ahead, in one process, and before wait(). Throws as launch.
  void launch_ahead(const std::vector<SequenceStep>& sequences, const std::vector<size_t>& behind);

  /// Makes the step that is ahead the last one.
  void take_ahead();

  /// Waits until the last step has been computed. Throws what the device reports.
  void wait();

  /// Chooses the next tokens of each row of the last step, on several threads: one, and one more for each draft that is
  /// the token chosen before it, up to the first that is not. A row of a sequence without logits is an error of the
  /// caller (std::out_of_range).
  std::vector<std::vector<SampledToken>> sample(const std::vector<SampleRow>& rows) const;

  /// How likely each of `tokens` was behind the last tokens of a sequence of the last step whose hidden states it
  /// wants, from the first of them on; with `num_top` of its rivals. Throws NumericsError for logits that are not
  /// numbers.
  std::vector<Logprobs> logprobs_of(size_t sequence, std::span<const int32_t> tokens, int64_t num_top);

  /// Logits [count, vocab] f32 of hidden states of the last step, from `first` on; one call on each rank.
  at::Tensor hidden_logits(int64_t first, int64_t count) const;

  /// Hidden state [hidden] of the last token of such a sequence, which has `num_hidden` of them.
  std::vector<float> last_hidden(size_t sequence, int64_t num_hidden) const;

  /// Whether such a sequence's last hidden state is finite. Its recurrent states are then as well, and so are the keys
  /// and values of its tokens, which all go into it.
  bool has_finite_state(size_t sequence, int64_t num_hidden) const;

  /// Hidden states [T, hidden] of all tokens of the last step, as StepOutput::all_hidden.
  const at::Tensor& all_hidden() const { return step_.result.all_hidden; }

  /// Where among them those of a sequence of the last step begin.
  int64_t first_token_row(size_t sequence) const { return step_.built.token_rows.at(sequence); }

  /// Time in the model, of the last step: from the packed step, or from take_ahead(), to the end of wait(), and in its
  /// head for logprobs_of().
  double forward_seconds() const { return forward_seconds_; }

  /// Host memory that is kept for the tensors of steps, in bytes.
  int64_t memory_bytes() const { return memory_.bytes(); }

  /// The last step as it was packed.
  const StepInput& input() const { return step_.built.input; }

  /// Its logits [R, vocab] f32: after wait() on the host, unless the largest ones are found on the device, where a step
  /// ahead may have taken their place. Of several ranks this one's part.
  const at::Tensor& logits() const { return step_.result.logits; }

 private:
  // What the device gives back of a step.
  struct Result {
    at::Tensor logits;
    at::Tensor hidden;              // of the sequences that want it, on the device
    at::Tensor hidden_sums;         // [P] f32 of their elements, on the host after wait()
    at::Tensor all_hidden;          // as StepOutput's
    kernel::LargestLogits largest;  // where the device finds them
  };
  struct RecordedStep {
    std::unique_ptr<kernel::DeviceGraph> graph;  // null: seen once
    Result result;
  };
  // A step that has been packed, and started.
  struct Step {
    BuiltStep built;
    Result result;
    HostCopy largest;                    // of the result
    at::Tensor tokens, values;           // of its logits, on the host after wait()
    std::optional<WantedLogits> wanted;  // where they do not say it all, and of several ranks
    Stopwatch since_start;               // or since it was taken
  };

  void start(Step& step, const std::vector<SequenceStep>& sequences);
  Result forward(const StepInput& input);
  bool can_be_recorded(const StepInput& input) const;
  Result run_recorded(const StepInput& input);
  int64_t first_row(size_t sequence) const;
  std::vector<int64_t> needs_of_rows(const Step& step, const std::vector<SequenceStep>& sequences) const;
  SampledToken choose(Sampler& sampler, int64_t row) const;
  static SampledToken choose_from(Sampler& sampler, std::span<const float> logits);

  std::shared_ptr<const HybridDecoder> model_;
  ProcessGroup* ranks_;
  Leader* leader_;
  BatchBuilder builder_;
  ModelState state_;  // the pools
  kernel::StepMemory memory_;
  Step step_;                  // the last one
  std::optional<Step> ahead_;  // the one behind it
  const bool has_graphs_;
  const bool finds_largest_;
  std::map<int64_t, RecordedStep> recorded_;  // by rows
  const void* recorded_at_ = nullptr;         // where the step's tensors lay
  double forward_seconds_ = 0;
};

}  // namespace xgdn
