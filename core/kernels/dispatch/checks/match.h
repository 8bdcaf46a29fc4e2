// SPDX-License-Identifier: Apache-2.0
// What the checks of the ops have in common: roles that a tensor plays in a call.
#pragma once

#include <initializer_list>

#include "core/kernels/dispatch/dims.h"
#include "core/kernels/ops/contract.h"
#include "core/kernels/ops/quantized_weight.h"

namespace xgdn::kernel {

// The dtypes of the first tensor of an op, which most of the others share.
inline constexpr std::initializer_list<at::ScalarType> kInputTypes = {at::kFloat, at::kBFloat16, at::kHalf};

inline void match_strided(Dims& d, std::string_view arg, const at::Tensor& t, std::string_view names,
                          std::initializer_list<at::ScalarType> allowed) {
  d.match(arg, t, names).dtype(arg, t, allowed).last_contiguous(arg, t);
}

// `t` is a tensor, or one that may be absent.
template <typename T>
void match_contiguous(Dims& d, std::string_view arg, const T& t, std::string_view names,
                      std::initializer_list<at::ScalarType> allowed) {
  d.match(arg, t, names).dtype(arg, t, allowed).contiguous(arg, t);
}

template <typename T>
void match_indices(Dims& d, std::string_view arg, const T& indices, std::string_view names) {
  match_contiguous(d, arg, indices, names, {at::kInt});
}

// Slots may have gaps between them.
inline void match_pool(Dims& d, std::string_view arg, const at::Tensor& pool, std::string_view names,
                       std::initializer_list<at::ScalarType> allowed) {
  d.match(arg, pool, names).dtype(arg, pool, allowed).contiguous(arg, pool, 1).written(arg);
}

// A result. `in_place` as in Dims::written.
inline void match_out(Dims& d, std::string_view arg, const at::Tensor& out, std::string_view names,
                      std::initializer_list<at::ScalarType> allowed, std::string_view in_place = {}) {
  match_strided(d, arg, out, names, allowed);
  d.written(arg, in_place);
}

inline void match_taps(Dims& d, std::string_view arg, const at::Tensor& weight, at::ScalarType in) {
  match_contiguous(d, arg, weight, "D W", {in});
  d.require(d.sym("W") >= 2 && d.sym("W") <= 4, arg, ": expected a width W of 2 to 4, got ", d.sym("W"));
}

// Names of the arguments and of the dimensions of a packed weight.
struct PackedNames {
  std::string_view codes, scales, zeros;
  std::string_view int8, int4, float8;  // dimensions of codes
  std::string_view groups;              // of scales and zeros
};

// The rows of a panel that D, bound by `arg`, makes in each format.
inline void bind_packed(Dims& d, std::string_view arg) {
  d.require(d.sym("D") % 32 == 0, arg, ": expected D a multiple of 32, got ", d.sym("D"));
  d.bind("D/4", d.sym("D") / 4, arg);
  d.bind("D/8", d.sym("D") / 8, arg);
  d.bind("D/2", d.sym("D") / 2, arg);
}

inline void match_packed(Dims& d, const QuantizedWeight& weight, const PackedNames& names) {
  const at::ScalarType dtype = weight.codes.defined() ? weight.codes.scalar_type() : at::kChar;
  const std::string_view dims = dtype == at::kByte            ? names.int4
                                : dtype == at::kFloat8_e4m3fn ? names.float8
                                                              : names.int8;
  match_contiguous(d, names.codes, weight.codes, dims, {at::kChar, at::kByte, at::kFloat8_e4m3fn});
  match_contiguous(d, names.scales, weight.scales, names.groups, kInputTypes);
  match_contiguous(d, names.zeros, weight.zeros, names.groups, {at::kChar});
  d.require(!weight.zeros || weight.codes.scalar_type() != at::kFloat8_e4m3fn, names.zeros,
            ": expected none beside codes of float8, got one");
  if (weight.activation_bits == 8 || weight.activation_bits == 16) return;
  throw RangeError(c10::str("[", d.op(), "] activation_bits: expected 8 or 16, got ", weight.activation_bits));
}

inline void require_groups(const Dims& d, std::string_view scales, std::string_view width, std::string_view groups) {
  const c10::SymInt& count = d.sym(groups);
  const auto makes = [&](int64_t size) { return count * size == d.sym(width); };
  if (count > 0 && (makes(32) || makes(64) || makes(128))) return;
  throw ShapeError(c10::str("[", d.op(), "] ", scales, ": expected ", groups, " groups of 32, 64 or 128 elements of ",
                            width, "=", d.sym(width), ", got ", groups, "=", count));
}

inline void bind_sequences(Dims& d, const at::Tensor& cu_seqlens) {
  match_indices(d, "cu_seqlens", cu_seqlens, "N+1");
  d.require(d.sym("N+1") >= 1, "cu_seqlens: expected at least one entry, got [0]");
  d.bind("N", d.sym("N+1") - 1, "cu_seqlens");
}

// A second copy of the index tensor `arg`, on the host whatever the device of the rest.
inline void match_host_copy(const Dims& d, std::string_view arg, const std::optional<at::Tensor>& copy,
                            std::string_view name) {
  if (!copy) return;
  const at::Tensor& t = *copy;
  const bool is_on_host = t.device().is_cpu() || (d.is_meta() && t.is_meta());
  if (!is_on_host || t.scalar_type() != at::kInt || t.dim() != 1 || t.sym_size(0) != d.sym(name) ||
      !t.is_contiguous()) {
    throw ShapeError(c10::str("[", d.op(), "] ", arg, "_cpu: expected a contiguous Int tensor [", name, "] with ", name,
                              "=", d.sym(name), " (set by cu_seqlens) on cpu, got ", c10::toString(t.scalar_type()),
                              " ", t.sym_sizes(), " on ", t.device().str()));
  }
  check_storage(d.op(), c10::str(arg, "_cpu"), t);
}

}  // namespace xgdn::kernel
