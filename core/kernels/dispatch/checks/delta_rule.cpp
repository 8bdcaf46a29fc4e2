// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/dispatch/checks/delta_rule.h"
#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/checks/replay.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

// What turns the logits of the gates into g.
template <typename Params>
void match_gate_weights(Dims& d, const Params& p, at::ScalarType in) {
  match_contiguous(d, "A_log", p.A_log, "HV", {at::kFloat, in});
  match_contiguous(d, "dt_bias", p.dt_bias, "HV", {at::kFloat, in});
}

void require_metadata(const Dims& d, std::string_view arg, const at::Tensor& t) {
  if (t.defined()) return;
  throw MissingMetadataError(
      c10::str("[chunk_gated_delta_rule] ", arg, ": expected the step's chunk metadata (N=", d.sym("N"),
               " sequences, see build_chunk_metadata), got none; ", "it is never recomputed inside an op"));
}

// H follows from the D channels [q | k | v] of `arg`.
void bind_key_heads(Dims& d, std::string_view arg) {
  const c10::SymInt qk = d.sym("D") - d.sym("HV") * d.sym("V");
  d.require(qk > 0 && qk % (d.sym("K") * 2) == 0, arg, ": expected a width of 2 H K + HV V with K=", d.sym("K"),
            ", HV=", d.sym("HV"), ", V=", d.sym("V"), " (set by state), got ", d.sym("D"));
  d.bind("H", qk / (d.sym("K") * 2), arg);
  d.require(d.sym("HV") % d.sym("H") == 0, arg, ": expected HV=", d.sym("HV"),
            " to be a multiple of H, got H=", d.sym("H"), " from its width");
}

// Every entry of a verification table belongs to one sequence.
void check_table(const IndexChecker& c, const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  c.slots("state_indices", p.state_indices, s.S);
  c.range("num_accepted", *p.num_accepted, 1, s.L, c10::str("1..L=", s.L));
  c.lengths(p.cu_seqlens, "L", s.L);
  const int32_t* table = p.state_indices.data_ptr<int32_t>();
  std::vector<bool> taken(static_cast<size_t>(s.S), false);
  for (int64_t i = 0; i < s.N * s.L; ++i) {
    if (table[i] == kPadSlot) continue;
    if (taken[table[i]]) c.fail("state_indices", "each slot once in the table", table[i], i);
    taken[table[i]] = true;
  }
}

}  // namespace

// ---- recurrent_gated_delta_rule -------------------------------------------------------------------------------------

Dims match(const RecurrentGatedDeltaRuleParams& p) {
  Dims d = match_delta_rule(p);
  if (p.num_accepted) {
    d.require(!p.write_indices, "write_indices: expected none beside num_accepted (the table names the write slots)");
    match_indices(d, "state_indices", p.state_indices, "N L");
    match_indices(d, "num_accepted", p.num_accepted, "N");
  } else {
    match_indices(d, "state_indices", p.state_indices, "N");
    match_indices(d, "write_indices", p.write_indices, "N");
    d.bind("L", 1, "state_indices");
  }
  return d;
}

GdnShape shape(const RecurrentGatedDeltaRuleParams&, const Dims& d) {
  return delta_shape(d);
}

template <>
RecurrentGatedDeltaRuleParams sample(const TypicalTensors& t) {
  return {.q = t.head,
          .k = t.head,
          .v = t.head,
          .g = t.gate,
          .beta = t.gate,
          .state = t.state,
          .cu_seqlens = t.cu_seqlens,
          .state_indices = t.slot,
          .out = t.out};
}

void check_indices(const RecurrentGatedDeltaRuleParams& p) {
  const GdnShape s = checked_shape(p);
  const IndexChecker c(Op<RecurrentGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  if (p.num_accepted) {
    check_table(c, p, s);
  } else {
    check_pool_indices(c, p, s.S);
  }
}

// ---- chunk_gated_delta_rule -----------------------------------------------------------------------------------------

Dims match(const ChunkGatedDeltaRuleParams& p) {
  Dims d = match_delta_rule(p);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_contiguous(d, "has_initial_state", p.has_initial_state, "N", {at::kBool});
  d.bind("L", 1, "state_indices");
  require_metadata(d, "chunk_indices", p.chunk_indices);
  require_metadata(d, "chunk_offsets", p.chunk_offsets);
  match_indices(d, "chunk_indices", p.chunk_indices, "M 2");
  match_indices(d, "chunk_offsets", p.chunk_offsets, "N+1");
  check_accuracy_name(Op<ChunkGatedDeltaRuleParams>::name, "accuracy", p.accuracy);
  return d;
}

GdnShape shape(const ChunkGatedDeltaRuleParams&, const Dims& d) {
  return delta_shape(d);
}

template <>
ChunkGatedDeltaRuleParams sample(const TypicalTensors& t) {
  return {.q = t.head,
          .k = t.head,
          .v = t.head,
          .g = t.gate,
          .beta = t.gate,
          .state = t.state,
          .cu_seqlens = t.cu_seqlens,
          .state_indices = t.slot,
          .chunk_indices = t.chunk.chunk_indices_chunk64,
          .chunk_offsets = t.chunk.chunk_offsets_chunk64,
          .out = t.out};
}

void check_indices(const ChunkGatedDeltaRuleParams& p) {
  const GdnShape s = checked_shape(p);
  const IndexChecker c(Op<ChunkGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
  const int32_t* cu = p.cu_seqlens.data_ptr<int32_t>();
  const int32_t* offsets = p.chunk_offsets.data_ptr<int32_t>();
  if (offsets[0] != 0) c.fail("chunk_offsets", "to start at 0", offsets[0], 0);
  for (int64_t n = 0; n < s.N; ++n) {
    const int64_t chunks = (cu[n + 1] - cu[n] + kChunkSize - 1) / kChunkSize;
    if (offsets[n + 1] - offsets[n] != chunks) {
      c.fail("chunk_offsets",
             c10::str("a step of ", chunks, " chunks for the ", cu[n + 1] - cu[n], " tokens in cu_seqlens"),
             offsets[n + 1] - offsets[n], n + 1);
    }
  }
  if (offsets[s.N] != p.chunk_indices.size(0)) {
    c.fail("chunk_offsets", c10::str("to end at the ", p.chunk_indices.size(0), " rows of chunk_indices"), offsets[s.N],
           s.N);
  }
}

// ---- packed_decode --------------------------------------------------------------------------------------------------

Dims match(const PackedDecodeParams& p) {
  Dims d(Op<PackedDecodeParams>::name);
  match_strided(d, "mixed_qkv", p.mixed_qkv, "N D", kInputTypes);
  const at::ScalarType in = p.mixed_qkv.scalar_type();
  match_strided(d, "a", p.a, "N HV", {in});
  match_strided(d, "b", p.b, "N HV", {in});
  match_gate_weights(d, p, in);
  match_delta_state(d, p.state);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_out(d, "out", p.out, "N HV V", {at::kFloat, in});
  bind_key_heads(d, "mixed_qkv");
  d.bind("T", d.sym("N"), "mixed_qkv");
  d.bind("L", 1, "state_indices");
  return d;
}

GdnShape shape(const PackedDecodeParams&, const Dims& d) {
  return delta_shape(d);
}

template <>
PackedDecodeParams sample(const TypicalTensors& t) {
  return {.mixed_qkv = t.row,
          .a = t.logit,
          .b = t.logit,
          .A_log = t.per_head,
          .dt_bias = t.per_head,
          .state = t.state,
          .state_indices = t.slot,
          .out = t.out};
}

void check_indices(const PackedDecodeParams& p) {
  check_pool_indices(IndexChecker(Op<PackedDecodeParams>::name), p, checked_shape(p).S);
}

// ---- gdn_gating -----------------------------------------------------------------------------------------------------

Dims match(const GdnGatingParams& p) {
  Dims d(Op<GdnGatingParams>::name);
  match_strided(d, "a", p.a, "T HV", kInputTypes);
  const at::ScalarType in = p.a.scalar_type();
  match_strided(d, "b", p.b, "T HV", {in});
  match_gate_weights(d, p, in);
  match_contiguous(d, "g", p.g, "T HV", {at::kFloat});
  match_contiguous(d, "beta", p.beta, "T HV", {at::kFloat});
  d.written("g").written("beta");
  return d;
}

GdnShape shape(const GdnGatingParams&, const Dims& d) {
  return {.T = d["T"], .HV = d["HV"]};
}

template <>
GdnGatingParams sample(const TypicalTensors& t) {
  return {.a = t.logit, .b = t.logit, .A_log = t.per_head, .dt_bias = t.per_head, .g = t.out_gate, .beta = t.out_beta};
}

// ---- gdn_decode_step ------------------------------------------------------------------------------------------------

Dims match(const GdnDecodeStepParams& p) {
  Dims d(Op<GdnDecodeStepParams>::name);
  match_strided(d, "projected", p.projected, "N P", kInputTypes);
  const at::ScalarType in = p.projected.scalar_type();
  match_taps(d, "conv_weight", p.conv_weight, in);
  match_contiguous(d, "conv_bias", p.conv_bias, "D", {in});
  match_pool(d, "conv_state", p.conv_state, "conv_S conv_R D", {in, at::kFloat});
  d.require(d.sym("conv_R") >= d.sym("W") - 1, "conv_state: expected R >= ", d.sym("W") - 1, " rows for W=", d.sym("W"),
            ", got ", d.sym("conv_R"));
  match_gate_weights(d, p, in);
  match_delta_state(d, p.state);
  match_contiguous(d, "norm_weight", p.norm_weight, "V", {at::kFloat, in});
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  if (p.conv_slots) {
    match_indices(d, "conv_indices", p.conv_slots->read, "N");
    match_indices(d, "conv_write_indices", p.conv_slots->write, "N");
  }
  match_indices(d, "cu_seqlens", p.cu_seqlens, "N+1");
  if (p.cu_seqlens) {
    d.require(d.sym("N+1") == d.sym("N") + 1, "cu_seqlens: expected [N+1] with N=", d.sym("N"),
              " (set by projected), got [", d.sym("N+1"), "]");
  }
  match_out(d, "out", p.out, "N HV V", {in});
  bind_key_heads(d, "conv_weight");
  const c10::SymInt width = d.sym("D") + d.sym("HV") * d.sym("V") + d.sym("HV") * 2;
  d.require(d.sym("P") == width, "projected: expected a width of D + HV V + 2 HV = ", width, " with D=", d.sym("D"),
            " (set by conv_weight), HV=", d.sym("HV"), ", V=", d.sym("V"), ", got ", d.sym("P"));
  if (p.ring) {
    match_ring(d, *p.ring, /*is_written=*/true);
    require_chunk_size(d, p.chunk_size);
  }
  return d;
}

DecodeStepShape shape(const GdnDecodeStepParams& p, const Dims& d) {
  const int64_t N = d["N"];
  return {.rule = {.T = N, .N = N, .S = d["S"], .H = d["H"], .HV = d["HV"], .K = d["K"], .V = d["V"]},
          .conv = {.T = N, .N = N, .S = d["conv_S"], .D = d["D"], .W = d["W"], .R = d["conv_R"]},
          .B = p.ring ? d["B"] : 0,
          .R = p.ring ? d["R"] : 0};
}

template <>
GdnDecodeStepParams sample(const TypicalTensors& t) {
  return {.projected = t.projected,
          .conv_weight = t.taps,
          .conv_state = t.conv_state,
          .A_log = t.per_head,
          .dt_bias = t.per_head,
          .state = t.state,
          .norm_weight = t.per_dim,
          .state_indices = t.slot,
          .out = t.out};
}

void check_indices(const GdnDecodeStepParams& p) {
  const DecodeStepShape s = checked_shape(p);
  const IndexChecker c(Op<GdnDecodeStepParams>::name);
  const SlotIndices conv_slots = conv_slots_of(p);
  const at::Tensor& reads = conv_slots.read;
  const at::Tensor writes = conv_slots.write.value_or(reads);
  const int64_t num_slots = p.ring ? std::min(s.conv.S, s.B) : s.conv.S;
  p.ring ? check_pool_slots(c, p, s.rule.S) : check_pool_indices(c, p, s.rule.S);
  check_own_slots(c, "conv_indices", reads, p.state_indices, num_slots);
  c.slots("conv_write_indices", writes, num_slots);
  c.writes("conv_indices", writes, "conv_indices", reads, num_slots);
  if (p.ring) {
    check_checkpoint_writes(c, p, s.rule.S, [&](int64_t n) {
      return ring_length(c, *p.ring, reads.const_data_ptr<int32_t>()[n], p.chunk_size) + 1 == p.chunk_size;
    });
  }
  if (p.cu_seqlens) c.range_of_ones("cu_seqlens", *p.cu_seqlens);
}

void check_accuracy_name(std::string_view of, std::string_view arg, const std::string& accuracy) {
  if (accuracy == "auto" || accuracy == "fast" || accuracy == "exact") return;
  throw UnsupportedError(c10::str("[", of, "] ", arg, ": expected auto, fast or exact, got '", accuracy, "'"));
}

}  // namespace xgdn::kernel
