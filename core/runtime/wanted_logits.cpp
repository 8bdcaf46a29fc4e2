// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/wanted_logits.h"

#include <algorithm>
#include <limits>

#include "core/kernels/ops_api.h"
#include "core/runtime/logit_row.h"
#include "core/runtime/select_rows.h"

namespace xgdn {
namespace {

// `rows` in ascending order, each once.
at::Tensor part_of(const at::Tensor& table, const std::vector<int64_t>& rows) {
  const auto count = std::ssize(rows);
  return rows.back() - rows.front() + 1 == count ? table.narrow(0, rows.front(), count) : select_rows(table, rows);
}

// [n, vocab] of the ranks' parts [world, n, part].
at::Tensor rows_of(const at::Tensor& parts) {
  return parts.permute({1, 0, 2}).flatten(1);
}

}  // namespace

int64_t num_candidates(const Request& request) {
  const SamplingParams& p = request.sampling;
  const bool has_rules = request.grammar || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 ||
                         p.repetition_penalty != 1.0 || p.min_tokens > 0 || !p.logit_bias.empty() ||
                         !p.bad_words.empty();
  if (has_rules || p.logprobs) return 0;
  if (p.temperature == 0.0) return 1;
  return p.top_k <= kernel::kMostLikeliest ? p.top_k : 0;
}

WantedLogits::WantedLogits(const at::Tensor& local, const std::vector<int64_t>& needs, ProcessGroup* group)
    : part_(local.size(1)) {
  std::vector<int64_t> whole;
  std::vector<int64_t> with_candidates;
  const auto gathered = [group](const at::Tensor& part) {
    return group == nullptr ? part.unsqueeze(0) : group->all_gather(part);
  };
  for (size_t row = 0; row < needs.size(); ++row) {
    std::vector<int64_t>& rows = needs[row] == 0 ? whole : with_candidates;
    is_whole_.push_back(needs[row] == 0);
    places_.push_back(needs[row] == kNotWanted ? -1 : std::ssize(rows));
    if (needs[row] == kNotWanted) continue;
    rows.push_back(static_cast<int64_t>(row));
    num_candidates_ = std::max(num_candidates_, needs[row]);
  }
  num_candidates_ = std::min(num_candidates_, part_);
  if (!whole.empty()) whole_ = gathered(part_of(local, whole));
  if (!with_candidates.empty())
    candidates_ = gathered(kernel::likeliest_logits(part_of(local, with_candidates).contiguous(), num_candidates_));
}

void WantedLogits::start_to_host() {
  if (whole_.defined()) whole_on_its_way_.emplace(rows_of(whole_));
  if (candidates_.defined()) candidates_on_their_way_.emplace(candidates_);
}

void WantedLogits::to_host() {
  if (whole_.defined()) {
    whole_ = whole_on_its_way_ ? whole_on_its_way_->wait() : rows_of(whole_).to(at::kCPU).contiguous();
  }
  if (candidates_.defined()) {
    candidates_ = candidates_on_their_way_ ? candidates_on_their_way_->wait() : candidates_.to(at::kCPU).contiguous();
  }
}

std::span<const float> WantedLogits::candidates(int64_t row, int64_t rank) const {
  const int64_t begin = (rank * candidates_.size(1) + places_.at(static_cast<size_t>(row))) * 2 * num_candidates_;
  return {reinterpret_cast<const float*>(candidates_.const_data_ptr<int32_t>()) + begin,
          static_cast<size_t>(num_candidates_)};
}

std::span<const int32_t> WantedLogits::tokens(int64_t row, int64_t rank) const {
  const int64_t begin = ((rank * candidates_.size(1) + places_.at(static_cast<size_t>(row))) * 2 + 1) * num_candidates_;
  return {candidates_.const_data_ptr<int32_t>() + begin, static_cast<size_t>(num_candidates_)};
}

std::span<const float> WantedLogits::row(int64_t row, std::vector<float>& memory) const {
  if (is_whole_.at(static_cast<size_t>(row))) {
    const int64_t vocab = whole_.size(1);
    return {whole_.const_data_ptr<float>() + places_[static_cast<size_t>(row)] * vocab, static_cast<size_t>(vocab)};
  }
  const int64_t world = candidates_.size(0);
  memory.assign(static_cast<size_t>(world * part_), -std::numeric_limits<float>::infinity());
  for (int64_t rank = 0; rank < world; ++rank) {
    const std::span<const float> logits = candidates(row, rank);
    const std::span<const int32_t> of_rank = tokens(row, rank);
    for (size_t i = 0; i < logits.size(); ++i) memory[static_cast<size_t>(rank * part_ + of_rank[i])] = logits[i];
  }
  return memory;
}

int32_t WantedLogits::largest(int64_t row) const {
  const auto of_rank = [&](int64_t rank) {
    return TokenLogit{candidates(row, rank).front(), rank * part_ + tokens(row, rank).front()};
  };
  TokenLogit largest = of_rank(0);
  for (int64_t rank = 1; rank < candidates_.size(0); ++rank) {
    if (const TokenLogit other = of_rank(rank); is_likelier(other, largest)) largest = other;
  }
  check_largest_logit(largest.logit, largest.token);
  return static_cast<int32_t>(largest.token);
}

at::Tensor gather_logits(const at::Tensor& local, ProcessGroup& group) {
  return rows_of(group.all_gather(local));
}

}  // namespace xgdn
