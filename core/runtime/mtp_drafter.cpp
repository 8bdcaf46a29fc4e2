// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/mtp_drafter.h"

#include <algorithm>
#include <set>
#include <utility>

#include "core/runtime/select_rows.h"

namespace xgdn {
namespace {

// Pieces are few and of every length: padding them would serve no recorded step.
BatchLimits limits_of(BatchLimits limits) {
  limits.decode_buckets = {};
  return limits;
}

}  // namespace

// A piece on its way: at first its tokens, then one draft after the other.
struct MtpDrafter::Draft {
  size_t piece;
  int64_t row;  // of the hidden states that are read, that of the first token
  int64_t position;
  std::vector<int32_t> next_tokens;
  const std::vector<int32_t>* kv_blocks;
  int64_t num_wanted;
};

MtpDrafter::MtpDrafter(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states,
                       KvCache& kv)
    : model_(std::move(model)),
      block_size_(options.kv_block_size),
      builder_(limits_of(batch_limits(*model_, options)), model_->device()),
      state_{states.layers(), kv.layers()} {}

int64_t MtpDrafter::buffer_bytes(const BatchLimits& limits, c10::Device device) {
  return BatchBuilder::buffer_bytes(limits_of(limits), device);
}

std::vector<MtpDrafter::Draft> MtpDrafter::without_shared_rows(const std::vector<MtpPiece>& pieces) const {
  std::vector<Draft> drafts;
  std::set<std::pair<int32_t, int64_t>> last_rows;  // pieces that share any share the last one
  for (size_t i = 0; i < pieces.size(); ++i) {
    const MtpPiece& piece = pieces[i];
    const int64_t last = piece.first_position + std::ssize(piece.next_tokens) - 1;
    const int32_t block = piece.kv_blocks.at(static_cast<size_t>(last / block_size_));
    if (!last_rows.emplace(block, last % block_size_).second) continue;
    drafts.push_back({.piece = i,
                      .row = piece.first_row,
                      .position = piece.first_position,
                      .next_tokens = piece.next_tokens,
                      .kv_blocks = &piece.kv_blocks,
                      .num_wanted = piece.num_drafts});
  }
  return drafts;
}

// The head's hidden states of the drafts' tokens; each draft's row is that of its last one afterwards.
at::Tensor MtpDrafter::forward(const at::Tensor& hidden, std::vector<Draft>& drafts) {
  std::vector<SequenceStep> steps;
  for (const Draft& draft : drafts) {
    const auto slot = static_cast<int32_t>(steps.size());  // no state is read or written
    steps.push_back({.kind = draft.next_tokens.size() == 1 ? SegmentKind::kDecode : SegmentKind::kPrefill,
                     .tokens = draft.next_tokens,
                     .num_cached = draft.position,
                     .state_slots = {slot},
                     .write_slot = slot,
                     .conv_slot = slot,
                     .conv_write_slot = slot,
                     .kv_blocks = *draft.kv_blocks,
                     .wants_logits = false});
  }
  const BuiltStep built = builder_.build(steps);
  std::vector<int64_t> rows(static_cast<size_t>(built.input.gdn.num_tokens));
  for (size_t i = 0; i < drafts.size(); ++i) {
    const int64_t first = built.token_rows[i];
    const auto count = std::ssize(drafts[i].next_tokens);
    for (int64_t t = 0; t < count; ++t) rows[static_cast<size_t>(first + t)] = drafts[i].row + t;
    drafts[i].row = first + count - 1;
  }
  const kernel::StepMemory::Use use(memory_);
  return model_->forward_mtp(built.input, select_rows(hidden, rows), state_);
}

std::vector<int32_t> MtpDrafter::largest(const at::Tensor& hidden) const {
  const at::Tensor on_host = kernel::largest_logits(model_->logits(hidden)).tokens().to(at::kCPU);
  return {on_host.const_data_ptr<int32_t>(), on_host.const_data_ptr<int32_t>() + on_host.numel()};
}

std::vector<std::vector<int32_t>> MtpDrafter::run(const at::Tensor& hidden, const std::vector<MtpPiece>& pieces) {
  std::vector<std::vector<int32_t>> drafted(pieces.size());
  std::vector<Draft> drafts = without_shared_rows(pieces);
  at::Tensor last = hidden;
  while (!drafts.empty()) {
    last = forward(last, drafts);
    std::erase_if(drafts, [](const Draft& draft) { return draft.num_wanted == 0; });
    if (drafts.empty()) break;
    std::vector<int64_t> rows;
    for (const Draft& draft : drafts) rows.push_back(draft.row);
    last = select_rows(last, rows);
    const std::vector<int32_t> tokens = largest(last);
    for (size_t i = 0; i < drafts.size(); ++i) {
      Draft& draft = drafts[i];
      drafted[draft.piece].push_back(tokens[i]);
      draft.position += std::ssize(draft.next_tokens);
      draft.row = static_cast<int64_t>(i);
      draft.next_tokens = {tokens[i]};
      --draft.num_wanted;
    }
    std::erase_if(drafts, [&](const Draft& draft) {
      return draft.num_wanted == 0 || draft.position >= std::ssize(*draft.kv_blocks) * block_size_;
    });
  }
  return drafted;
}

}  // namespace xgdn
