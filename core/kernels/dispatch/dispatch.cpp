// SPDX-License-Identifier: Apache-2.0
// Check once, select a backend, run it with the call's device as the current one.
#include <c10/core/DeviceGuard.h>

#include "core/kernels/dispatch/op_checks.h"
#include "core/kernels/dispatch/op_recorder.h"
#include "core/kernels/dispatch/selection.h"

namespace xgdn::kernel {
namespace {

// Returns the sizes of the call.
template <class Params>
typename Op<Params>::Shape serve(const Params& p) {
  const auto s = checked_shape(p);
  const c10::OptionalDeviceGuard guard(Op<Params>::primary(p).device());
  const Backend& backend = select(p, s);
  backend.run(p, s);
  last_used<Params>.store(&backend, std::memory_order_relaxed);
  last_was_invariant<Params>.store(backend.is_batch_invariant(p, s), std::memory_order_relaxed);
  return s;
}

template <class Params>
void dispatch(const Params& p) {
  OpRecorder* recorder = OpRecorder::of_thread();
  if (recorder == nullptr) {
    serve(p);
    return;
  }
  const auto begin = OpRecorder::Clock::now();
  const auto s = serve(p);
  recorder->record(Op<Params>::name, sizes_of(s), begin);
}

}  // namespace

template <class Params>
void check(const Params& p) {
  checked(p);
}

#define XGDN_OP_FUNCTION(Params, name, ...) \
  template void check(const Params& p);     \
  void name(const Params& p) {              \
    dispatch(p);                            \
  }
XGDN_OPS(XGDN_OP_FUNCTION)
#undef XGDN_OP_FUNCTION

void npu_recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p) {
  RecurrentGatedDeltaRuleParams on_npu = p;
  on_npu.backend = "npu";
  dispatch(on_npu);
}

}  // namespace xgdn::kernel
