// SPDX-License-Identifier: Apache-2.0
// The gated delta rule on the CPU over pointers, strides and sizes: decode, verification and packed decode.
#pragma once

#include <cstdint>

#include "core/kernels/cpu/rows.h"

namespace xgdn::kernel::cpu {

/// Letters as in ops_api.h. Strides count elements.
struct GatedDeltaRuleArgs {
  int64_t N = 0;
  int64_t H = 0;
  int64_t HV = 0;
  int64_t K = 0;  // multiple of 16, at most kMaxHeadDim
  int64_t V = 0;  // as K
  int64_t L = 1;  // columns of read_slots

  InRows q;        // [T, H, K]
  InRows k;        // [T, H, K]
  InRows v;        // [T, HV, V]
  InRows g;        // [T, HV]     log decay; with A_log the logit a
  InRows beta;     // [T, HV]     with A_log the logit b
  OutRows out;     // [T, HV, V]
  InRows A_log;    // [HV]        no data: g and beta are given
  InRows dt_bias;  // [HV]        beside A_log

  void* state = nullptr;  // [S, HV, V, K]  f32 | bf16
  bool is_state_bfloat16 = false;
  int64_t slot_stride = 0;

  const int32_t* cu_seqlens = nullptr;    // [N+1]   null: one token a sequence
  const int32_t* read_slots = nullptr;    // [N, L]
  const int32_t* write_slots = nullptr;   // [N]     unused with num_accepted
  const int32_t* num_accepted = nullptr;  // [N]     not null: verification, read_slots is the table

  float scale = 1.0f;
  bool normalise_qk = true;

  int64_t v_block = 0;  // rows of S per work item, multiple of 16
};

inline constexpr int64_t kHeadDimStep = 16;
inline constexpr int64_t kMaxHeadDim = 256;

/// Work items are (sequence, value head, block of V rows), blocks fastest; any thread may take any of them in any
/// order.
inline int64_t num_work_items(const GatedDeltaRuleArgs& args) {
  return args.N * args.HV * ((args.V + args.v_block - 1) / args.v_block);
}

void gated_delta_rule(const GatedDeltaRuleArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
