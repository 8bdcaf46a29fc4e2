// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on replay states, over tokens in memory; and the plain states that they stand for.
#include "core/kernels/cpu/replay_gated_delta_rule.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/replay_gated_delta_rule.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/replay_gated_delta_rule-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

void replay_gated_delta_rule(const ReplayGatedDeltaRuleArgs& args, int64_t begin, int64_t end) {
  TokensInMemory tokens(args);
  replay_items(args, tokens, begin, end);
}

// ---- plain states ---------------------------------------------------------------------------------------------------

template <typename State>
void materialize_items(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, int64_t begin, int64_t end) {
  const auto K = static_cast<size_t>(args.K), V = static_cast<size_t>(args.V), R = static_cast<size_t>(args.ring.R);
  const int64_t shared = args.HV / args.H;
  float* k = scratch<Replay<State>>(R * (K + V) + padded(args.ring.R));
  float* w = k + R * K;
  float* logs = w + R * V;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / args.H;
    const int64_t key_head = item % args.H;
    if (args.state.read[n] < 0 || args.state.write[n] < 0) continue;
    const auto count = static_cast<size_t>(lengths[n]);
    const int32_t slot = args.ring.read[n];
    std::copy_n(args.ring.keys(slot, key_head, args.K), count * K, k);
    for (size_t row = 0; row < count; ++row) to_pool_order<State>(k + row * K, K);
    for (int64_t h = key_head * shared; h < (key_head + 1) * shared; ++h) {
      const State* S = args.state.slot<State>(args.state.read[n]) + h * args.V * args.K;
      State* dst = args.state.slot<State>(args.state.write[n]) + h * args.V * args.K;
      if (count == 0) {
        std::memmove(dst, S, V * K * sizeof(State));
        continue;
      }
      fold<State>(S, count, k, args.ring.gates(slot, h), args.ring.updates(slot, h, args.V), K, V, w, logs, dst,
                  nullptr);
    }
  }
}

void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, int64_t begin, int64_t end) {
  with_state_type(args.state.dtype,
                  [&](auto element) { materialize_items<decltype(element)>(args, lengths, begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(materialize_state);
HWY_EXPORT(replay_gated_delta_rule);

int64_t first_length(const ReplayGatedDeltaRuleArgs& args, int64_t n) {
  if (args.has_initial_state != nullptr && !args.has_initial_state[n]) return 0;
  return args.ring.length[args.ring.read[n]] + (args.num_accepted == nullptr ? 0 : args.num_accepted[n]);
}

void replay_gated_delta_rule(const ReplayGatedDeltaRuleArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(replay_gated_delta_rule)(args, begin, end);
}

void materialize_state(const ReplayGatedDeltaRuleArgs& args, const int32_t* lengths, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(materialize_state)(args, lengths, begin, end);
}

void write_ring_lengths(const ReplayGatedDeltaRuleArgs& args) {
  for (int64_t n = 0; n < args.N; ++n) {
    if (!is_written(args, n)) continue;
    const int64_t length = first_length(args, n) + (args.commit ? num_tokens(args, n) : 0);
    args.ring.length[args.ring.write[n]] = static_cast<int32_t>(length % args.C);
  }
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
