// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/cpu/expert_products.h"

#include <algorithm>
#include <cstring>

#include "core/kernels/cpu/gates.h"

namespace xgdn::kernel::cpu {
namespace {

constexpr auto kPanelVisits = static_cast<int64_t>(kPanel);
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

const void* row_of(const InRows& x, const int64_t* rows, int64_t visit) {
  return x.at(rows == nullptr ? visit : rows[visit], 0);
}

}  // namespace

ExpertVisits sort_by_expert(const int64_t* chosen, int64_t T, int64_t A, int64_t E) {
  std::vector<int64_t> begin(static_cast<size_t>(E) + 1);
  for (int64_t i = 0; i < T * A; ++i) ++begin[static_cast<size_t>(chosen[i]) + 1];
  ExpertVisits visits;
  for (size_t e = 0; e < static_cast<size_t>(E); ++e) {
    const int64_t count = begin[e + 1];
    begin[e + 1] += begin[e];
    if (count == 0) continue;
    visits.groups.push_back({.expert = static_cast<int64_t>(e),
                             .begin = begin[e],
                             .count = count,
                             .panel = static_cast<int64_t>(visits.panels.size())});
    for (int64_t i = 0; i < count; i += kPanelVisits) {
      visits.panels.push_back({.begin = begin[e] + i, .count = std::min(kPanelVisits, count - i)});
    }
  }
  visits.tokens.resize(static_cast<size_t>(T * A));
  visits.visits.resize(static_cast<size_t>(T * A));
  for (int64_t i = 0; i < T * A; ++i) {
    const int64_t visit = begin[static_cast<size_t>(chosen[i])]++;
    visits.visits[static_cast<size_t>(i)] = visit;
    visits.tokens[static_cast<size_t>(visit)] = i / A;
  }
  return visits;
}

void ExpertProduct::set_memory(void* memory, const ExpertVisits& visits) {
  memory_ = static_cast<char*>(memory);
  visits_ = &visits;
}

// ---- rows -----------------------------------------------------------------------------------------------------------

int64_t ExpertRows::num_bytes(const ExpertVisits& visits) const {
  return visits.size() * stride();
}

LinearRowsArgs ExpertRows::of_visits(int64_t visit, int64_t count) const {
  LinearRowsArgs args = args_;
  args.T = count;
  char* const tokens = memory_ + visit * stride();
  if (widens_) {
    args.widened = reinterpret_cast<float*>(tokens);
  } else {
    args.x = {.data = tokens, .dtype = DType::kBFloat16, .token_stride = args.D};
  }
  return args;
}

void ExpertRows::arrange(const InRows& x, const int64_t* rows, int64_t panel) const {
  const auto [begin, count] = visits_->panels[static_cast<size_t>(panel)];
  for (int64_t visit = begin; visit < begin + count; ++visit) {
    const void* const from = row_of(x, rows, visit);
    if (widens_) {
      LinearRowsArgs row = of_visits(visit, 1);
      row.x = {.data = from, .dtype = x.dtype};
      widen_tokens(row, 0, 1);
    } else {
      std::memcpy(memory_ + visit * stride(), from, static_cast<size_t>(stride()));
    }
  }
}

void ExpertRows::multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const {
  LinearRowsArgs args = of_visits(group.begin, group.count);
  args.O = width;
  args.weight += (group.expert * args_.O + output) * args.weight_stride;
  args.out = out;
  const int64_t items = num_work_items(args);
  linear_rows(args, 0, items, items);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

int64_t ExpertTiles::num_bytes(const ExpertVisits& visits) const {
  return static_cast<int64_t>(visits.panels.size()) * kPanelVisits * args_.D * size_of(DType::kBFloat16);
}

uint16_t* ExpertTiles::packed(int64_t panel) const {
  return reinterpret_cast<uint16_t*>(memory_) + panel * kPanelVisits * args_.D;
}

void ExpertTiles::arrange(const InRows& x, const int64_t* rows, int64_t panel) const {
  const auto [begin, count] = visits_->panels[static_cast<size_t>(panel)];
  const auto depth = static_cast<size_t>(args_.D);
  thread_local std::vector<uint16_t> gathered;  // panels are packed from rows of one stride
  gathered.resize(static_cast<size_t>(count) * depth);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    std::memcpy(gathered.data() + i * depth, row_of(x, rows, begin + static_cast<int64_t>(i)),
                depth * sizeof(uint16_t));
  }
  LinearArgs args = args_;
  args.T = count;
  args.x = {.data = gathered.data(), .dtype = x.dtype, .token_stride = args.D};
  args.packed = packed(panel);
  pack_tokens(args, 0, 1);
}

void ExpertTiles::multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const {
  LinearArgs args = args_;
  args.T = group.count;
  args.O = width;
  args.weight += (group.expert * args_.O + output) * args.weight_stride;
  args.packed = packed(group.panel);
  args.out = out;
  linear(args, 0, num_work_items(args));
}

// ---- 8 and 4 bits ---------------------------------------------------------------------------------------------------

// Tokens, their scales, their sums.
int64_t QuantizedExperts::num_bytes(const ExpertVisits& visits) const {
  const int64_t V = visits.size();
  if (args_.format == Codes::kFloat8) return V * token_stride(args_);
  return aligned(V * token_stride(args_)) + aligned(V * num_groups(args_) * int64_t{sizeof(float)}) +
         V * num_groups(args_) * int64_t{sizeof(int32_t)};
}

QuantizedLinearArgs QuantizedExperts::of_visits(int64_t visit, int64_t count) const {
  QuantizedLinearArgs args = args_;
  args.T = count;
  args.by_tiles = takes_tiles(args.format, visits_->size() / std::max<int64_t>(std::ssize(visits_->groups), 1));
  args.tokens = memory_ + visit * token_stride(args);
  if (args.format == Codes::kFloat8) return args;
  const int64_t V = visits_->size();
  const int64_t groups = num_groups(args);
  char* scales = memory_ + aligned(V * token_stride(args));
  char* sums = scales + aligned(V * groups * int64_t{sizeof(float)});
  args.token_scales = reinterpret_cast<float*>(scales) + visit * groups;
  args.token_starts = reinterpret_cast<int32_t*>(sums) + visit * groups;
  return args;
}

void QuantizedExperts::arrange(const InRows& x, const int64_t* rows, int64_t panel) const {
  const auto [begin, count] = visits_->panels[static_cast<size_t>(panel)];
  for (int64_t visit = begin; visit < begin + count; ++visit) {
    QuantizedLinearArgs row = of_visits(visit, 1);
    row.x = {.data = row_of(x, rows, visit), .dtype = x.dtype};
    prepare_tokens(row, 0, 1);
  }
}

void QuantizedExperts::multiply(const ExpertVisits::Group& group, int64_t output, int64_t width,
                                const OutRows& out) const {
  constexpr int64_t kBitsOfByte = 8;
  const int64_t panel = (group.expert * args_.O + output) / kQuantizedPanel;
  const int64_t bits = args_.format == Codes::kInt4 ? 4 : 8;
  QuantizedLinearArgs args = of_visits(group.begin, group.count);
  args.O = width;
  args.codes += panel * kQuantizedPanel * args.D * bits / kBitsOfByte;
  args.scales.data = args.scales.at(panel, 0);
  if (args.zeros != nullptr) args.zeros += panel * num_groups(args) * kQuantizedPanel;
  args.out = out;
  quantized_linear(args, 0, num_work_items(args), num_work_items(args));
}

// ---- work items -----------------------------------------------------------------------------------------------------

namespace {

// Calls f(group, output, width) for the blocks of each group among the items.
template <class F>
void for_each_run(const ExpertVisits& visits, int64_t outputs, int64_t begin_item, int64_t end_item, const F& f) {
  const int64_t blocks = outputs / kExpertBlock;
  for (int64_t item = begin_item; item < end_item;) {
    const int64_t block = item % blocks;
    const int64_t count = std::min(blocks - block, end_item - item);
    f(visits.groups[static_cast<size_t>(item / blocks)], block * kExpertBlock, count * kExpertBlock);
    item += count;
  }
}

OutRows rows_at(OutRows rows, int64_t visit, int64_t column) {
  rows.data = rows.at(visit, column);
  return rows;
}

InRows read(const OutRows& rows) {
  return {.data = rows.data, .dtype = rows.dtype, .token_stride = rows.token_stride};
}

}  // namespace

void gated_experts(const GatedExpertsArgs& args, int64_t begin_item, int64_t end_item) {
  for_each_run(*args.visits, args.I, begin_item, end_item, [&](const auto& group, int64_t output, int64_t width) {
    const OutRows gate = rows_at(args.out, group.begin, output);
    const OutRows up = rows_at(args.out, group.begin, args.I + output);
    args.gate_up->multiply(group, output, width, gate);
    args.gate_up->multiply(group, args.I + output, width, up);
    silu_and_mul({.I = width, .gate = read(gate), .up = read(up), .out = gate}, 0, group.count);
  });
}

void expert_outputs(const ExpertOutputsArgs& args, int64_t begin_item, int64_t end_item) {
  for_each_run(*args.visits, args.D, begin_item, end_item, [&](const auto& group, int64_t output, int64_t width) {
    args.down->multiply(group, output, width, rows_at(args.out, group.begin, output));
  });
}

}  // namespace xgdn::kernel::cpu
