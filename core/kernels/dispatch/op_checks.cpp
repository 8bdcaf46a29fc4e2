// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/op_checks.h"

#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/dims.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {
namespace {

// The dtypes of the first tensor of an op, which most of the others share.
constexpr std::initializer_list<at::ScalarType> kInputTypes = {at::kFloat, at::kBFloat16, at::kHalf};

void match_strided(Dims& d, std::string_view arg, const at::Tensor& t, std::string_view names,
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
void match_pool(Dims& d, std::string_view arg, const at::Tensor& pool, std::string_view names,
                std::initializer_list<at::ScalarType> allowed) {
  d.match(arg, pool, names).dtype(arg, pool, allowed).contiguous(arg, pool, 1).written(arg);
}

// A result. `in_place` as in Dims::written.
void match_out(Dims& d, std::string_view arg, const at::Tensor& out, std::string_view names,
               std::initializer_list<at::ScalarType> allowed, std::string_view in_place = {}) {
  match_strided(d, arg, out, names, allowed);
  d.written(arg, in_place);
}

void match_delta_state(Dims& d, const at::Tensor& state) {
  match_pool(d, "state", state, "S HV V K", {at::kFloat, at::kBFloat16});
}

// What turns the logits of the gates into g.
template <typename Params>
void match_gate_weights(Dims& d, const Params& p, at::ScalarType in) {
  match_contiguous(d, "A_log", p.A_log, "HV", {at::kFloat, in});
  match_contiguous(d, "dt_bias", p.dt_bias, "HV", {at::kFloat, in});
}

void match_taps(Dims& d, std::string_view arg, const at::Tensor& weight, at::ScalarType in) {
  match_contiguous(d, arg, weight, "D W", {in});
  d.require(d.sym("W") >= 2 && d.sym("W") <= 4, arg, ": expected a width W of 2 to 4, got ", d.sym("W"));
}

void bind_sequences(Dims& d, const at::Tensor& cu_seqlens) {
  match_indices(d, "cu_seqlens", cu_seqlens, "N+1");
  d.require(d.sym("N+1") >= 1, "cu_seqlens: expected at least one entry, got [0]");
  d.bind("N", d.sym("N+1") - 1, "cu_seqlens");
}

// A second copy of cu_seqlens, on the host whatever the device of the rest.
void match_host_copy(const Dims& d, const std::optional<at::Tensor>& cu_seqlens_cpu) {
  if (!cu_seqlens_cpu) return;
  const at::Tensor& t = *cu_seqlens_cpu;
  if (!t.device().is_cpu() || t.scalar_type() != at::kInt || t.dim() != 1 || t.sym_size(0) != d.sym("N+1") ||
      !t.is_contiguous()) {
    throw ShapeError(c10::str("[", d.op(), "] cu_seqlens_cpu: expected a contiguous Int tensor [N+1] with N+1=",
                              d.sym("N+1"), " (set by cu_seqlens) on cpu, got ", c10::toString(t.scalar_type()), " ",
                              t.sym_sizes(), " on ", t.device().str()));
  }
  check_storage(d.op(), "cu_seqlens_cpu", t);
}

// The arguments that both delta rules share.
template <typename Params>
Dims match_delta_rule(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "q", p.q, "T H K", kInputTypes);
  const at::ScalarType in = p.q.scalar_type();
  match_strided(d, "k", p.k, "T H K", {in});
  match_strided(d, "v", p.v, "T HV V", {in});
  d.require(d.sym("H") > 0 && d.sym("HV") % d.sym("H") == 0, "v: expected HV to be a multiple of H=", d.sym("H"),
            " (set by q), got HV=", d.sym("HV"));
  match_strided(d, "g", p.g, "T HV", {at::kFloat});
  match_strided(d, "beta", p.beta, "T HV", {at::kFloat, in});
  match_delta_state(d, p.state);
  bind_sequences(d, p.cu_seqlens);
  match_host_copy(d, p.cu_seqlens_cpu);
  match_out(d, "out", p.out, "T HV V", {at::kFloat, in});
  return d;
}

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

void require_metadata(const Dims& d, std::string_view arg, const at::Tensor& t) {
  if (t.defined()) return;
  throw MissingMetadataError(
      c10::str("[chunk_gated_delta_rule] ", arg, ": expected the step's chunk metadata (N=", d.sym("N"),
               " sequences, see build_chunk_metadata), got none; ", "it is never recomputed inside an op"));
}

Dims match(const ChunkGatedDeltaRuleParams& p) {
  Dims d = match_delta_rule(p);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_contiguous(d, "has_initial_state", p.has_initial_state, "N", {at::kBool});
  require_metadata(d, "chunk_indices", p.chunk_indices);
  require_metadata(d, "chunk_offsets", p.chunk_offsets);
  match_indices(d, "chunk_indices", p.chunk_indices, "M 2");
  match_indices(d, "chunk_offsets", p.chunk_offsets, "N+1");
  check_accuracy_name(p.accuracy);
  return d;
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

template <typename Params>
Dims match_conv(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_taps(d, "weight", p.weight, in);
  match_contiguous(d, "bias", p.bias, "D", {in});
  match_pool(d, "conv_state", p.conv_state, "S R D", {in, at::kFloat});
  bind_sequences(d, p.cu_seqlens);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_out(d, "out", p.out, "T D", {in});
  return d;
}

void require_rows(Dims& d, int64_t new_rows) {
  d.require(d.sym("R") >= d.sym("W") - 2 + new_rows, "conv_state: expected R >= ", d.sym("W") - 2 + new_rows,
            " rows for W=", d.sym("W"), " and ", new_rows, " tokens a sequence, got ", d.sym("R"));
}

Dims match(const CausalConv1dParams& p) {
  Dims d = match_conv(p);
  match_contiguous(d, "has_initial_state", p.has_initial_state, "N", {at::kBool});
  require_rows(d, 1);
  return d;
}

Dims match(const CausalConv1dUpdateParams& p) {
  Dims d = match_conv(p);
  match_indices(d, "num_accepted", p.num_accepted, "N");
  d.require(p.max_len >= 1, "max_len: expected at least 1, got ", p.max_len);
  require_rows(d, p.max_len);
  return d;
}

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

Dims match(const L2NormParams& p) {
  Dims d(Op<L2NormParams>::name);
  match_strided(d, "x", p.x, "T H K", kInputTypes);
  match_out(d, "out", p.out, "T H K", {p.x.scalar_type()}, "x");
  return d;
}

Dims match(const RmsNormGatedParams& p) {
  Dims d(Op<RmsNormGatedParams>::name);
  match_strided(d, "x", p.x, "T HV V", kInputTypes);
  match_strided(d, "z", p.z, "T HV V", kInputTypes);
  const at::ScalarType in = p.z.scalar_type();
  match_contiguous(d, "weight", p.weight, "V", {at::kFloat, in});
  match_out(d, "out", p.out, "T HV V", {in}, "x z");
  return d;
}

Dims match(const GdnDecodeStepParams& p) {
  Dims d(Op<GdnDecodeStepParams>::name);
  match_strided(d, "projected", p.projected, "N P", kInputTypes);
  const at::ScalarType in = p.projected.scalar_type();
  match_taps(d, "conv_weight", p.conv_weight, in);
  match_contiguous(d, "conv_bias", p.conv_bias, "D", {in});
  match_pool(d, "conv_state", p.conv_state, "conv_S R D", {in, at::kFloat});
  d.require(d.sym("R") >= d.sym("W") - 1, "conv_state: expected R >= ", d.sym("W") - 1, " rows for W=", d.sym("W"),
            ", got ", d.sym("R"));
  match_gate_weights(d, p, in);
  match_delta_state(d, p.state);
  match_contiguous(d, "norm_weight", p.norm_weight, "V", {at::kFloat, in});
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "conv_indices", p.conv_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
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
  return d;
}

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

Dims match(const RmsNormParams& p) {
  Dims d(Op<RmsNormParams>::name);
  match_strided(d, "x", p.x, "T H D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weight", p.weight, "D", {at::kFloat, in});
  if (p.residual) match_out(d, "residual", *p.residual, "T H D", {in});
  match_out(d, "out", p.out, "T H D", {in}, "x");
  return d;
}

Dims match(const SiluAndMulParams& p) {
  Dims d(Op<SiluAndMulParams>::name);
  match_strided(d, "gate", p.gate, "T I", kInputTypes);
  const at::ScalarType in = p.gate.scalar_type();
  match_strided(d, "up", p.up, "T I", {in});
  match_out(d, "out", p.out, "T I", {in}, "gate up");
  return d;
}

Dims match(const LinearParams& p) {
  Dims d(Op<LinearParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_strided(d, "weight", p.weight, "O D", {in});
  match_contiguous(d, "bias", p.bias, "O", {in});
  match_out(d, "out", p.out, "T O", {at::kFloat, in});
  return d;
}

Dims match(const MoeExpertsParams& p) {
  const ExpertWeights& e = p.experts;
  Dims d(Op<MoeExpertsParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weights", p.weights, "T A", {in});
  match_contiguous(d, "chosen", p.chosen, "T A", {at::kLong});
  d.require(!e.gate.empty() && e.up.size() == e.gate.size() && e.down.size() == e.gate.size(),
            "experts: expected as many gate, up and down, at least one, got ", e.gate.size(), ", ", e.up.size(),
            " and ", e.down.size());
  d.bind("E", static_cast<int64_t>(e.gate.size()), "experts");
  match_strided(d, "experts.gate", e.gate.front(), "I D", {in});
  match_strided(d, "experts.up", e.up.front(), "I D", {in});
  match_strided(d, "experts.down", e.down.front(), "D I", {in});
  d.bind("G", d.sym("I") * 2, "experts.gate");
  match_contiguous(d, "experts.stacked_gate_up", e.stacked_gate_up, "E G D", {in});
  match_contiguous(d, "experts.stacked_down", e.stacked_down, "E D I", {in});
  if (!e.stacked_gate_up || !e.stacked_down) {
    for (const auto* experts : {&e.gate, &e.up, &e.down}) {
      for (const at::Tensor& expert : *experts) check_storage(d.op(), "experts", expert);
    }
  }
  match_contiguous(d, "out", p.out, "T D", {in});
  d.written("out");
  return d;
}

template <typename Params>
Dims matched(const Params& p) {
  Dims d = match(p);
  d.check_written();
  return d;
}

GdnShape delta_shape(const Dims& d) {
  return {.T = d["T"], .N = d["N"], .S = d["S"], .H = d["H"], .HV = d["HV"], .K = d["K"], .V = d["V"], .L = d["L"]};
}
GdnShape shape(const RecurrentGatedDeltaRuleParams&, const Dims& d) {
  return delta_shape(d);
}
GdnShape shape(const ChunkGatedDeltaRuleParams&, Dims d) {
  d.bind("L", 1, "state_indices");
  return delta_shape(d);
}
GdnShape shape(const PackedDecodeParams&, const Dims& d) {
  return delta_shape(d);
}
ConvShape conv_shape(const Dims& d) {
  return {.T = d["T"], .N = d["N"], .S = d["S"], .D = d["D"], .W = d["W"], .R = d["R"]};
}
ConvShape shape(const CausalConv1dParams&, const Dims& d) {
  return conv_shape(d);
}
ConvShape shape(const CausalConv1dUpdateParams&, const Dims& d) {
  return conv_shape(d);
}
GdnShape shape(const GdnGatingParams&, const Dims& d) {
  return {.T = d["T"], .HV = d["HV"]};
}
GdnShape shape(const L2NormParams&, const Dims& d) {
  return {.T = d["T"], .H = d["H"], .K = d["K"]};
}
GdnShape shape(const RmsNormGatedParams&, const Dims& d) {
  return {.T = d["T"], .HV = d["HV"], .V = d["V"]};
}
DecodeStepShape shape(const GdnDecodeStepParams&, const Dims& d) {
  const int64_t N = d["N"];
  return {.rule = {.T = N, .N = N, .S = d["S"], .H = d["H"], .HV = d["HV"], .K = d["K"], .V = d["V"]},
          .conv = {.T = N, .N = N, .S = d["conv_S"], .D = d["D"], .W = d["W"], .R = d["R"]}};
}
AttentionShape shape(const PagedAttentionParams& p, const Dims& d) {
  return {.T = d["T"], .N = static_cast<int64_t>(p.sequences.size()), .HQ = d["HQ"], .HKV = d["HKV"], .D = d["D"]};
}
NormShape shape(const RmsNormParams&, const Dims& d) {
  return {.T = d["T"], .H = d["H"], .D = d["D"]};
}
LinearShape shape(const SiluAndMulParams&, const Dims& d) {
  return {.T = d["T"], .O = d["I"]};
}
LinearShape shape(const LinearParams&, const Dims& d) {
  return {.T = d["T"], .D = d["D"], .O = d["O"]};
}
ExpertsShape shape(const MoeExpertsParams&, const Dims& d) {
  return {.T = d["T"], .A = d["A"], .E = d["E"], .D = d["D"], .I = d["I"]};
}

}  // namespace

ExpertWeights stacked_experts(const at::Tensor& gate_up, const at::Tensor& down) {
  const bool is_stacked = gate_up.dim() == 3 && down.dim() == 3 && gate_up.sym_size(0) == down.sym_size(0) &&
                          gate_up.sym_size(1) == down.sym_size(2) * 2;
  if (!is_stacked) {
    throw ShapeError(c10::str("[moe_experts] gate_up and down: expected [E, 2I, D] and [E, D, I], got ",
                              gate_up.sym_sizes(), " and ", down.sym_sizes()));
  }
  check_storage("moe_experts", "gate_up", gate_up);
  check_storage("moe_experts", "down", down);
  ExpertWeights experts{.stacked_gate_up = gate_up, .stacked_down = down};
  const int64_t I = down.size(2);
  for (int64_t e = 0; e < down.size(0); ++e) {
    experts.gate.push_back(gate_up[e].narrow(0, 0, I));
    experts.up.push_back(gate_up[e].narrow(0, I, I));
    experts.down.push_back(down[e]);
  }
  return experts;
}

void check_accuracy_name(const std::string& accuracy) {
  if (accuracy == "auto" || accuracy == "fast" || accuracy == "exact") return;
  throw UnsupportedError(
      c10::str("[chunk_gated_delta_rule] accuracy: expected auto, fast or exact, got '", accuracy, "'"));
}

GdnShape checked_shape(const RecurrentGatedDeltaRuleParams& p) {
  return shape(p, matched(p));
}
GdnShape checked_shape(const ChunkGatedDeltaRuleParams& p) {
  return shape(p, matched(p));
}
GdnShape checked_shape(const PackedDecodeParams& p) {
  return shape(p, matched(p));
}
ConvShape checked_shape(const CausalConv1dParams& p) {
  return shape(p, matched(p));
}
ConvShape checked_shape(const CausalConv1dUpdateParams& p) {
  return shape(p, matched(p));
}
GdnShape checked_shape(const GdnGatingParams& p) {
  return shape(p, matched(p));
}
GdnShape checked_shape(const L2NormParams& p) {
  return shape(p, matched(p));
}
GdnShape checked_shape(const RmsNormGatedParams& p) {
  return shape(p, matched(p));
}
DecodeStepShape checked_shape(const GdnDecodeStepParams& p) {
  return shape(p, matched(p));
}
AttentionShape checked_shape(const PagedAttentionParams& p) {
  return shape(p, matched(p));
}
NormShape checked_shape(const RmsNormParams& p) {
  return shape(p, matched(p));
}
LinearShape checked_shape(const SiluAndMulParams& p) {
  return shape(p, matched(p));
}
LinearShape checked_shape(const LinearParams& p) {
  return shape(p, matched(p));
}
ExpertsShape checked_shape(const MoeExpertsParams& p) {
  return shape(p, matched(p));
}

void check(const RecurrentGatedDeltaRuleParams& p) {
  matched(p);
}
void check(const ChunkGatedDeltaRuleParams& p) {
  matched(p);
}
void check(const PackedDecodeParams& p) {
  matched(p);
}
void check(const CausalConv1dParams& p) {
  matched(p);
}
void check(const CausalConv1dUpdateParams& p) {
  matched(p);
}
void check(const GdnGatingParams& p) {
  matched(p);
}
void check(const L2NormParams& p) {
  matched(p);
}
void check(const RmsNormGatedParams& p) {
  matched(p);
}
void check(const GdnDecodeStepParams& p) {
  matched(p);
}
void check(const PagedAttentionParams& p) {
  matched(p);
}
void check(const RmsNormParams& p) {
  matched(p);
}
void check(const SiluAndMulParams& p) {
  matched(p);
}
void check(const LinearParams& p) {
  matched(p);
}
void check(const MoeExpertsParams& p) {
  matched(p);
}

}  // namespace xgdn::kernel
