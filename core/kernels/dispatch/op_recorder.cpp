// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/op_recorder.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <utility>

namespace xgdn::kernel {
namespace {

thread_local std::unique_ptr<OpRecorder> owned;

double seconds(OpRecorder::Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

}  // namespace

thread_local constinit OpRecorder* OpRecorder::of_thread_ = nullptr;

void OpRecorder::record(std::string_view op, const Sizes& sizes, Clock::time_point begin) {
  const Clock::time_point end = Clock::now();
  auto row = std::ranges::find_if(rows_, [&](const Row& r) { return r.op == op && r.sizes == sizes; });
  if (row == rows_.end()) row = rows_.insert(rows_.end(), Row{.op = op, .sizes = sizes});
  ++row->calls;
  row->inside += end - begin;
  row->before += begin - last_;
  last_ = end;
}

void start_op_profile() {
  owned = std::make_unique<OpRecorder>();
  OpRecorder::of_thread_ = owned.get();
}

std::vector<OpTime> stop_op_profile() {
  OpRecorder::of_thread_ = nullptr;
  const std::unique_ptr<OpRecorder> recorder = std::move(owned);
  std::vector<OpTime> times;
  if (!recorder) return times;
  for (const OpRecorder::Row& row : recorder->rows_) {
    OpTime& time = times.emplace_back(OpTime{.op = std::string(row.op),
                                             .calls = row.calls,
                                             .seconds = seconds(row.inside),
                                             .seconds_before = seconds(row.before)});
    std::ranges::copy_if(row.sizes, std::back_inserter(time.sizes), [](int64_t size) { return size != 0; });
  }
  return times;
}

}  // namespace xgdn::kernel
