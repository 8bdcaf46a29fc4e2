// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

// Where the sequences lie; every number is on the host.
void require_sequences(Dims& d, const PagedAttentionParams& p) {
  int64_t tokens = 0;
  int64_t context = 0;
  for (size_t n = 0; n < p.sequences.size(); ++n) {
    const AttentionSequence& s = p.sequences[n];
    const auto require = [&](bool ok, const auto&... expected) {
      if (ok) return;
      throw RangeError(c10::str("[", d.op(), "] sequences: expected ", expected..., ", got token_begin=", s.token_begin,
                                " num_tokens=", s.num_tokens, " context_len=", s.context_len,
                                " block_begin=", s.block_begin, " num_blocks=", s.num_blocks, " at ", n));
    };
    require(s.token_begin == tokens && s.num_tokens >= 0, "one that begins at token ", tokens);
    require(s.num_tokens <= s.context_len, "a context that holds the tokens");
    require(s.block_begin >= 0 && s.num_blocks >= 0 && s.block_begin + s.num_blocks <= d["M"],
            "blocks among the M=", d["M"], " of block_ids");
    require(s.context_len <= s.num_blocks * d["B"], "blocks of B=", d["B"], " rows that hold the context");
    tokens += s.num_tokens;
    context += s.context_len;
  }
  d.require(tokens == d["T"], "sequences: expected T=", d["T"], " tokens (set by q), got ", tokens);
  d.require(!p.context_rows || context == d["C"], "context_rows: expected C=", context, " (set by sequences), got ",
            p.context_rows ? d["C"] : 0);
}

}  // namespace

// ---- paged_attention ------------------------------------------------------------------------------------------------

Dims match(const PagedAttentionParams& p) {
  Dims d(Op<PagedAttentionParams>::name);
  match_strided(d, "q", p.q, "T HQ D", kInputTypes);
  const at::ScalarType in = p.q.scalar_type();
  match_contiguous(d, "k", p.k, "P B HKV D", {in});
  match_contiguous(d, "v", p.v, "P B HKV D", {in});
  d.require(d.sym("HKV") > 0 && d.sym("HQ") % d.sym("HKV") == 0, "k: expected HQ=", d.sym("HQ"),
            " (set by q) to be a multiple of HKV, got HKV=", d.sym("HKV"));
  match_indices(d, "block_ids", p.block_ids, "M");
  match_indices(d, "context_rows", p.context_rows, "C");
  match_out(d, "out", p.out, "T HQ D", {in});
  require_sequences(d, p);
  return d;
}

AttentionShape shape(const PagedAttentionParams& p, const Dims& d) {
  return {.T = d["T"], .N = static_cast<int64_t>(p.sequences.size()), .HQ = d["HQ"], .HKV = d["HKV"], .D = d["D"]};
}

template <>
PagedAttentionParams sample(const TypicalTensors& t) {
  return {.q = t.head,
          .k = t.block,
          .v = t.block,
          .block_ids = t.slot,
          .sequences = {{.num_tokens = 1, .context_len = 1, .num_blocks = 1}},
          .out = t.out,
          .context_rows = t.slot};
}

void check_indices(const PagedAttentionParams& p) {
  checked_shape(p);
  const IndexChecker c(Op<PagedAttentionParams>::name);
  const int64_t blocks = p.k.size(0);
  const int64_t rows = blocks * p.k.size(1);
  c.range("block_ids", p.block_ids, 0, blocks - 1, c10::str("0..", blocks - 1));
  if (p.context_rows) c.range("context_rows", *p.context_rows, 0, rows - 1, c10::str("0..", rows - 1));
}

// ---- store_kv -------------------------------------------------------------------------------------------------------

Dims match(const StoreKvParams& p) {
  Dims d(Op<StoreKvParams>::name);
  match_strided(d, "k", p.k, "T HKV D", kInputTypes);
  const at::ScalarType in = p.k.scalar_type();
  match_strided(d, "v", p.v, "T HKV D", {in});
  match_contiguous(d, "k_cache", p.k_cache, "P B HKV D", {in});
  match_contiguous(d, "v_cache", p.v_cache, "P B HKV D", {in});
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
  if (p.may_have_padding) {
    c.range("slot_mapping", p.slot_mapping, kPadSlot, last,
            c10::str("a row 0..", last, " or ", kPadSlot, " for padding"));
  } else {
    c.range("slot_mapping", p.slot_mapping, 0, last, c10::str("a row 0..", last, " (may_have_padding is false)"));
  }
  c.written_once("slot_mapping", p.slot_mapping, "row");
}

}  // namespace xgdn::kernel
