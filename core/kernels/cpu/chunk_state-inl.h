// SPDX-License-Identifier: Apache-2.0
// States between their pool and a work item: S [V, K] in the pool's type, S^T in panels of 16 columns in f32.
#if defined(XGDN_CORE_KERNELS_CPU_CHUNK_STATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CHUNK_STATE_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CHUNK_STATE_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CHUNK_STATE_INL_H_
#endif

#include <cstdint>

#include "core/kernels/cpu/chunk_work-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

template <typename State>
State* pool_rows(const ChunkGatedDeltaRuleArgs& args, const Item& item, int32_t slot, int64_t head) {
  return args.state.slot<State>(slot) + (head * args.V + item.v_begin) * args.K;
}

// A NaN of the pool becomes the plain one, which survives every rounding.
inline void plain_nans(float* S, size_t size) {
  const F32 d;
  for (size_t i = 0; i < size; i += hn::Lanes(d)) {
    const VF x = hn::Load(d, S + i);
    hn::Store(hn::IfThenElse(hn::IsNaN(x), hn::NaN(d), x), d, S + i);
  }
}

template <typename State>
void read_state(const State* from, size_t panels, size_t K, float* S) {
  HWY_ALIGN float rows[kPanel * kMaxDim];
  for (size_t panel = 0; panel < panels; ++panel, from += kPanel * K) {
    const F32 d;
    for (size_t i = 0; i < kPanel * K; i += hn::Lanes(d)) hn::Store(load(d, from + i), d, rows + i);
    plain_nans(rows, kPanel * K);
    transpose(rows, kPanel, K, K, S + panel * K * kPanel, kPanel);
  }
}

template <typename State>
void write_state(const float* S, size_t panels, size_t K, State* to) {
  const F32 d;
  HWY_ALIGN float rows[kPanel * kMaxDim];
  for (size_t panel = 0; panel < panels; ++panel, to += kPanel * K) {
    transpose(S + panel * K * kPanel, K, kPanel, kPanel, rows, K);
    for (size_t i = 0; i < kPanel * K; i += hn::Lanes(d)) store(d, hn::Load(d, rows + i), to + i);
  }
}

// The states as operands of the first chunk.
inline void pack_states(const Item& item, const Work<BFloat16Mode>& w) {
  const F32 d;
  for (int64_t panel = 0; panel < item.num_heads * item.num_panels; ++panel) {
    const float* S = w.S + panel * w.K * kPanel;
    uint16_t* state = w.state + panel * w.depth * kPanel;
    for (size_t i = 0; i < w.K; i += 2) {
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        const VF even = hn::Load(d, S + i * kPanel + lane), odd = hn::Load(d, S + (i + 1) * kPanel + lane);
        store_pair<BFloat16Mode::kState>(d, even, odd, pair_at(state, i / 2, lane), w.state_part);
      }
    }
  }
}
inline void pack_states(const Item&, const Work<Float32Mode>&) {}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CHUNK_STATE_INL_H_
