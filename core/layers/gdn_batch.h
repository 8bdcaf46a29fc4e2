// SPDX-License-Identifier: Apache-2.0
// What a GDN layer needs to know about a step: segments of packed tokens, never requests. Filled by the runtime.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/kernels/ops_api.h"

namespace xgdn {

/// What a segment does: one token a sequence, a check of drafts, a piece of a prompt.
enum class SegmentKind { kDecode, kVerify, kPrefill };

/// A run of tokens that one op call serves. Index tensors are int32 on the layer's device; offsets count from
/// token_begin. Absent tensors mean what the ops say of an absent argument.
struct Segment {
  SegmentKind kind = SegmentKind::kDecode;
  int64_t token_begin = 0;
  int64_t num_tokens = 0;
  at::Tensor cu_seqlens;            // [N+1]
  kernel::SlotIndices state_slots;  // of the delta pool; kVerify of plain states: read [N, L], without write
  kernel::SlotIndices conv_slots;   // of the conv pool; kVerify of plain states: without write
  std::optional<at::Tensor> has_initial_state;  // [N]   bool, kPrefill
  std::optional<at::Tensor> num_accepted;  // [N]   kVerify, of the sequence's previous step: 1 where it verified none
  std::optional<at::Tensor> num_uncommitted;  // [N]   kVerify of replay states: as above, 0 where it verified none
  std::optional<at::Tensor> chunk_indices;    // [M, 2] kPrefill; chunk_indices_chunk64 of kernel::ChunkMetadata
  std::optional<at::Tensor> chunk_offsets;    // [N+1] kPrefill; chunk_offsets_chunk64
  kernel::HostFacts host;                     // without context_lens
};

/// Fills in what follows from cu_seqlens_cpu: num_tokens, host, and cu_seqlens beside state_slots. Throws
/// ShapeError, DtypeError, DeviceError or RangeError unless it is [N+1] int32 on the host that starts at 0 and never
/// falls.
void set_lengths(Segment& segment, const at::Tensor& cu_seqlens_cpu);

/// One step. The segments cover the tokens 0..num_tokens-1 in order, without gaps.
struct GdnBatch {
  int64_t num_tokens = 0;
  std::vector<Segment> segments;
};

/// The step of these segments, in their order.
GdnBatch join(std::vector<Segment> segments);

}  // namespace xgdn
