// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/follower.h"

#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <utility>

#include "core/runtime/sequence_logits.h"
#include "core/runtime/wanted_logits.h"

namespace xgdn {
namespace {

template <class... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

}  // namespace

void meet_ranks(const HybridDecoder& model, const RunnerOptions& options, ProcessGroup& group) {
  constexpr std::array kNames = {
      "the model's weights and dtype", "max_batch_size",     "max_cached_tokens", "kv_block_size",
      "max_tokens_per_step",           "prefix_cache_slots", "draft_tokens",      "bytes of a state slot",
      "bytes of a KV cache block"};
  const std::vector<int64_t> numbers{static_cast<int64_t>(model.digest()),
                                     options.max_batch_size,
                                     options.max_cached_tokens,
                                     options.kv_block_size,
                                     options.max_tokens_per_step,
                                     options.prefix_cache_slots,
                                     model.max_draft_tokens(),
                                     state_slot_bytes(model),
                                     kv_spec(model, options.kv_block_size).block_bytes()};
  const at::Tensor of_ranks = group.meet(at::tensor(numbers, at::kLong));
  for (int64_t rank = 1; rank < group.world(); ++rank) {
    for (size_t i = 0; i < kNames.size(); ++i) {
      const auto at_rank = [&](int64_t r) { return of_ranks[r][static_cast<int64_t>(i)].item<int64_t>(); };
      if (at_rank(rank) == at_rank(0)) continue;
      throw RankError(
          c10::str("[Engine] tensor_parallel: expected ranks of one model and one set of options, got another ",
                   kNames[i], " on rank ", rank, ": ", at_rank(rank), ", and ", at_rank(0), " on rank 0"));
    }
  }
}

std::unique_ptr<Follower> Follower::load(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  if (!options.ranks || options.ranks->rank() == 0) {
    throw RequestError("[Follower] ranks: expected a group in which this process is not the first, got " +
                       std::string(options.ranks ? "rank 0" : "none"));
  }
  const LoadedDecoder loaded = load_decoder(dir, options);
  auto follower = std::make_unique<Follower>(loaded.model, options.runner, options.ranks);
  meet_ranks(*loaded.model, options.runner, *options.ranks);
  return follower;
}

Follower::Follower(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options,
                   std::shared_ptr<ProcessGroup> group)
    : model_(std::move(model)),
      group_(std::move(group)),
      states_(model_->state_specs(), num_state_slots(options), model_->device(), /*poison_freed=*/false),
      kv_(kv_spec(*model_, options.kv_block_size), num_kv_blocks(*model_, options), model_->device()),
      runner_(model_, options, states_, kv_, group_.get()),
      memory_(model_->config(), model_->state_specs(), group_->rank(), group_->world()),
      channel_(*group_) {}

void Follower::follow() {
  const c10::InferenceMode inference;
  for (;;) {
    for (const RankCommand& command : read_commands(channel_.receive())) {
      if (!execute(command)) return;
    }
  }
}

// False when there is nothing more to follow.
bool Follower::execute(const RankCommand& command) {
  const std::vector<GdnState>& states = states_.layers();
  const std::vector<KvPool>& kv = kv_.layers();
  std::visit(Overloaded{
                 [&](const StepCommand& c) { runner_.launch(c.sequences); },
                 [&](const CopySlotCommand& c) { copy_slot(states, c.group, c.from, c.to); },
                 [&](const FillSlotCommand& c) { fill_slot(states, c.group, c.slot, c.fill); },
                 [&](const CommitDraftsCommand& c) { commit_drafts(states, c.slot, c.num_accepted); },
                 [&](const CopyBlockCommand& c) { copy_block(kv, c.from, c.to); },
                 [&](const SaveBlocksCommand& c) { saved_[c.id] = save_blocks(kv, c.blocks); },
                 [&](const RestoreBlocksCommand& c) { restore_blocks(kv, saved_.at(c.id), c.rows, c.blocks); },
                 [&](const DropBlocksCommand& c) { saved_.erase(c.id); },
                 [&](const LogitsCommand& c) { runner_.hidden_logits(c.first, c.count); },
                 [&](const PromptLogitsCommand& c) { gather_logits(sequence_logits(*model_, c.prompt), *group_); },
                 [&](const GatherMemoryCommand& c) { memory_.gather(save_memory(states, kv, c.place), *group_); },
                 [&](const ScatterMemoryCommand& c) {
                   load_memory(states, kv, c.place,
                               memory_.scatter(nullptr, save_memory(states, kv, c.place), *group_));
                 },
                 [](const ShutDownCommand&) {},
             },
             command);
  return !std::holds_alternative<ShutDownCommand>(command);
}

}  // namespace xgdn
