// SPDX-License-Identifier: Apache-2.0
// The thread's recorder behind start_op_profile.
#pragma once

#include <array>
#include <chrono>
#include <string_view>
#include <vector>

#include "core/kernels/op_profile.h"
#include "core/kernels/shapes.h"

namespace xgdn::kernel {

/// Sizes by which the calls of an op are told apart, zeros left out.
using Sizes = std::array<int64_t, 3>;
inline Sizes sizes_of(const GdnShape& s) {
  return {s.HV, s.V, s.K};
}
inline Sizes sizes_of(const ConvShape& s) {
  return {s.D, s.W, 0};
}
inline Sizes sizes_of(const DecodeStepShape& s) {
  return sizes_of(s.rule);
}
inline Sizes sizes_of(const ReplayShape& s) {
  return sizes_of(s.rule);
}
inline Sizes sizes_of(const NormShape& s) {
  return {s.H, s.D, 0};
}
inline Sizes sizes_of(const LinearShape& s) {
  return {s.O, s.D, 0};
}
inline Sizes sizes_of(const QuantizedLinearShape& s) {
  return {s.O, s.D, s.group_size};
}
inline Sizes sizes_of(const AttentionShape& s) {
  return {s.HQ, s.HKV, s.D};
}
inline Sizes sizes_of(const KvShape& s) {
  return {s.HKV, s.D, 0};
}
inline Sizes sizes_of(const SlotsShape&) {
  return {};
}
inline Sizes sizes_of(const ExpertsShape& s) {
  return {s.E, s.I, s.D};
}
inline Sizes sizes_of(const QuantizedExpertsShape& s) {
  return sizes_of(s.experts);
}

/// For one thread.
class OpRecorder {
 public:
  using Clock = std::chrono::steady_clock;

  /// The calling thread's, or null while nothing is to be recorded: all that a call costs then is this load.
  static OpRecorder* of_thread() { return of_thread_; }

  /// Records a call that began at `begin` and has just ended.
  void record(std::string_view op, const Sizes& sizes, Clock::time_point begin);

 private:
  friend void start_op_profile();
  friend std::vector<OpTime> stop_op_profile();

  struct Row {
    std::string_view op;
    Sizes sizes{};
    int64_t calls = 0;
    Clock::duration inside{};
    Clock::duration before{};
  };

  static thread_local constinit OpRecorder* of_thread_;

  std::vector<Row> rows_;
  Clock::time_point last_ = Clock::now();
};

}  // namespace xgdn::kernel
