// SPDX-License-Identifier: Apache-2.0
// What every op promises and asks for. Each is a struct, with shape and dtype on every tensor, and a function.
//
// Letters: T tokens packed over all sequences, N sequences, S state slots, H key heads, HV value heads (HV % H == 0;
// value head h reads key head h / (HV/H)), K and V head dims, W conv width, D channels, R rows of a conv slot,
// L columns of a verification table, C chunk size (64), I and O widths.
//
// Every op checks dtypes, shapes, devices and strides once, before it selects a backend, and throws DtypeError,
// ShapeError, DeviceError, MissingMetadataError or UnsupportedError (core/errors.h). Values inside index tensors are
// the caller's promise (check_indices() verifies them on the host). Slots that a call does not name are bitwise
// unchanged; every row of `out` is written; rows of padded sequences are zero.
//
// "strided" beside a tensor: the last dimension is contiguous, all others are free. Everything else is contiguous.
//
// What an op writes has memory of its own: no element shares it with another one, nor with another tensor of the call,
// whether read or written. Where a comment says that `out` may be an input it may be that tensor, element for element.
// A storage that holds less than sizes and strides reach, as after resize_, is a ShapeError.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "core/errors.h"

namespace xgdn::kernel {

/// A slot index that means "no slot": the sequence's output is zero and nothing is written for it.
inline constexpr int32_t kPadSlot = -1;

/// What the host knows of a call's sequences. Backends that need to know more than shapes tell read it here, because
/// nobody reads a value back from a device. Errors name the tensors as Python does: cu_seqlens_cpu, context_lens_cpu.
struct HostFacts {
  std::optional<at::Tensor> cu_seqlens = {};    // [N+1] i32 on the host, equal to the op's cu_seqlens
  std::optional<at::Tensor> context_lens = {};  // [N]   i32 on the host, equal to the op's context_lens
  int64_t max_len = 1;                          // tokens of the longest sequence; for causal_conv1d_update alone
  bool may_have_padding = true;                 // false: the caller promises that no slot is kPadSlot
};

/// Checks without running: what an op does first, usable on meta and fake tensors. For the parameters of every op.
template <class Params>
void check(const Params& p);

/// Throws ShapeError where the storage of `t` holds less than its sizes and strides reach. The ops ask it of every
/// tensor; it is for those that others hand to ATen.
void check_storage(std::string_view op, std::string_view arg, const at::Tensor& t);

// check_indices, beside the ops that have indices, checks the values inside their index tensors, which must be on the
// host: cu_seqlens starts at 0, never falls and ends at T; slots are kPadSlot or 0..S-1; num_accepted is 1..L; no slot
// is written twice; blocks, rows and experts exist. Throws RangeError. For callers that did not make the indices
// themselves.

}  // namespace xgdn::kernel
