// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

// What the lengths say of each other and of the table; both are on the host.
void require_contexts(const Dims& d, const at::Tensor& cu_seqlens, const at::Tensor& context_lens,
                      const std::optional<at::Tensor>& context_rows) {
  const IndexChecker c(d.op());
  c.cu_seqlens(cu_seqlens, d["T"]);
  c.range("context_lens", context_lens, 0, kMaxIndex, "at least 0");
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* contexts = context_lens.const_data_ptr<int32_t>();
  const int64_t room = d["M"] * d["B"];
  int64_t num_rows = 0;
  for (int64_t n = 0; n < context_lens.numel(); ++n) {
    const auto require = [&](bool ok, const auto&... expected) {
      if (ok) return;
      throw RangeError(
          c10::str("[", d.op(), "] context_lens: expected ", expected..., ", got ", contexts[n], " at index ", n));
    };
    const int64_t num_tokens = cu[n + 1] - cu[n];
    require(contexts[n] == 0 || contexts[n] >= num_tokens, "a context that holds the ", num_tokens,
            " tokens (set by cu_seqlens), or 0 for padding");
    require(contexts[n] <= room, "at most ", room, " rows in the M=", d["M"],
            " blocks (set by block_table) of B=", d["B"], " rows");
    num_rows += contexts[n];
  }
  if (!context_rows || d["C"] == num_rows) return;
  throw ShapeError(
      c10::str("[", d.op(), "] context_rows: expected C=", num_rows, " (set by context_lens), got ", d["C"]));
}

// The caches of keys and of values.
void match_caches(Dims& d, std::string_view k_arg, const at::Tensor& k, std::string_view v_arg, const at::Tensor& v,
                  at::ScalarType tokens) {
  const bool are_int8 = k.defined() && k.scalar_type() == at::kChar;
  const std::string_view names = are_int8 ? "P B HKV D+4" : "P B HKV D";
  if (are_int8) {
    d.require(d.sym("D") % 4 == 0, k_arg, ": expected D a multiple of 4 for rows of int8, got ", d.sym("D"));
    d.bind("D+4", d.sym("D") + 4, k_arg);
  }
  match_contiguous(d, k_arg, k, names, {tokens, at::kChar});
  match_contiguous(d, v_arg, v, names, {are_int8 ? at::kChar : tokens});
}

}  // namespace

// ---- paged_attention ------------------------------------------------------------------------------------------------

Dims match(const PagedAttentionParams& p) {
  Dims d(Op<PagedAttentionParams>::name);
  match_strided(d, "q", p.q, "T HQ D", kInputTypes);
  const at::ScalarType in = p.q.scalar_type();
  match_caches(d, "k", p.k, "v", p.v, in);
  d.require(d.sym("HKV") > 0 && d.sym("HQ") % d.sym("HKV") == 0, "k: expected HQ=", d.sym("HQ"),
            " (set by q) to be a multiple of HKV, got HKV=", d.sym("HKV"));
  bind_sequences(d, p.cu_seqlens);
  match_strided(d, "block_table", p.block_table, "N M", {at::kInt});
  match_indices(d, "context_lens", p.context_lens, "N");
  match_indices(d, "context_rows", p.context_rows, "C");
  match_out(d, "out", p.out, "T HQ D", {in});
  match_host_copy(d, "cu_seqlens", p.host.cu_seqlens, "N+1");
  match_host_copy(d, "context_lens", p.host.context_lens, "N");
  return d;
}

AttentionShape shape(const PagedAttentionParams&, const Dims& d) {
  return {.T = d["T"], .N = d["N"], .HQ = d["HQ"], .HKV = d["HKV"], .D = d["D"]};
}

template <>
PagedAttentionParams sample(const TypicalTensors& t) {
  return {.q = t.head,
          .k = t.block,
          .v = t.block,
          .block_table = t.slot.view({1, 1}),
          .context_lens = t.cu_seqlens.narrow(0, 1, 1),
          .cu_seqlens = t.cu_seqlens,
          .out = t.out,
          .context_rows = t.slot};
}

void check_host_facts(const PagedAttentionParams& p) {
  if (p.host.cu_seqlens && p.host.context_lens) {
    require_contexts(checked(p), *p.host.cu_seqlens, *p.host.context_lens, p.context_rows);
  }
}

void check_indices(const PagedAttentionParams& p) {
  const Dims d = checked(p);
  const IndexChecker c(d.op());
  require_contexts(d, p.cu_seqlens, p.context_lens, p.context_rows);
  const int64_t num_blocks = d["P"];
  const int64_t rows_of_block = d["B"];
  for (int64_t n = 0; n < p.context_lens.numel(); ++n) {
    const int32_t* blocks = p.block_table.const_data_ptr<int32_t>() + n * p.block_table.stride(0);
    const int64_t used = (p.context_lens.const_data_ptr<int32_t>()[n] + rows_of_block - 1) / rows_of_block;
    for (int64_t i = 0; i < used; ++i) {
      if (blocks[i] >= 0 && blocks[i] < num_blocks) continue;
      c.fail("block_table", c10::str("a block 0..", num_blocks - 1, " in row ", n), blocks[i], i);
    }
  }
  const int64_t num_rows = num_blocks * d["B"];
  if (p.context_rows) c.range("context_rows", *p.context_rows, 0, num_rows - 1, c10::str("0..", num_rows - 1));
}

// ---- store_kv -------------------------------------------------------------------------------------------------------

Dims match(const StoreKvParams& p) {
  Dims d(Op<StoreKvParams>::name);
  match_strided(d, "k", p.k, "T HKV D", kInputTypes);
  const at::ScalarType in = p.k.scalar_type();
  match_strided(d, "v", p.v, "T HKV D", {in});
  match_caches(d, "k_cache", p.k_cache, "v_cache", p.v_cache, in);
  d.written("k_cache").written("v_cache");
  match_indices(d, "slot_mapping", p.slot_mapping, "T");
  return d;
}

KvShape shape(const StoreKvParams&, const Dims& d) {
  return {.T = d["T"], .P = d["P"], .B = d["B"], .HKV = d["HKV"], .D = d["D"]};
}

template <>
StoreKvParams sample(const TypicalTensors& t) {
  return {.k = t.head, .v = t.head, .k_cache = t.block, .v_cache = t.out_block, .slot_mapping = t.slot};
}

void check_indices(const StoreKvParams& p) {
  const KvShape s = checked_shape(p);
  const IndexChecker c(Op<StoreKvParams>::name);
  const int64_t last = s.P * s.B - 1;
  if (p.host.may_have_padding) {
    c.range("slot_mapping", p.slot_mapping, kPadSlot, last,
            c10::str("a row 0..", last, " or ", kPadSlot, " for padding"));
  } else {
    c.range("slot_mapping", p.slot_mapping, 0, last, c10::str("a row 0..", last, " (may_have_padding is false)"));
  }
  c.written_once("slot_mapping", p.slot_mapping, "row");
}

}  // namespace xgdn::kernel
