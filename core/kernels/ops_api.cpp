// SPDX-License-Identifier: Apache-2.0
// Check once, select a backend, run. The only file that checks tensors.
#include "core/kernels/ops_api.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>

#include "core/kernels/backend.h"
#include "core/kernels/dims.h"
#include "core/kernels/registry.h"

namespace xgdn::kernel {
namespace {

// ---- what each op is called, and the phase it belongs to ------------------------------------------------------------

constexpr std::array<std::string_view, 8> kOpNames = {"recurrent_gated_delta_rule",
                                                      "chunk_gated_delta_rule",
                                                      "packed_decode",
                                                      "causal_conv1d",
                                                      "causal_conv1d_update",
                                                      "gdn_gating",
                                                      "l2_norm",
                                                      "rms_norm_gated"};

template <typename Params>
struct Op;
#define XGDN_OP(params, op_index, op_phase)                   \
  template <>                                                 \
  struct Op<params> {                                         \
    static constexpr size_t index = op_index;                 \
    static constexpr std::string_view name = kOpNames[index]; \
    static constexpr Phase phase = op_phase;                  \
  }
XGDN_OP(RecurrentGatedDeltaRuleParams, 0, Phase::kDecode);
XGDN_OP(ChunkGatedDeltaRuleParams, 1, Phase::kPrefill);
XGDN_OP(PackedDecodeParams, 2, Phase::kDecode);
XGDN_OP(CausalConv1dParams, 3, Phase::kPrefill);
XGDN_OP(CausalConv1dUpdateParams, 4, Phase::kDecode);
XGDN_OP(GdnGatingParams, 5, Phase::kDecode);
XGDN_OP(L2NormParams, 6, Phase::kDecode);
XGDN_OP(RmsNormGatedParams, 7, Phase::kDecode);
#undef XGDN_OP

// ---- shapes ---------------------------------------------------------------------------------------------------------

void bind_sequences(Dims& d, const at::Tensor& cu_seqlens) {
  d.match("cu_seqlens", cu_seqlens, "N+1")
      .dtype("cu_seqlens", cu_seqlens, {at::kInt})
      .contiguous("cu_seqlens", cu_seqlens);
  d.require(d.sym("N+1") >= 1, "cu_seqlens: expected at least one entry, got [0]");
  d.bind("N", d.sym("N+1") - 1, "cu_seqlens");
}

void match_indices(Dims& d, std::string_view arg, const std::optional<at::Tensor>& indices, std::string_view names) {
  d.match(arg, indices, names).dtype(arg, indices, {at::kInt}).contiguous(arg, indices);
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
}

void match_flags(Dims& d, const std::optional<at::Tensor>& has_initial_state) {
  d.match("has_initial_state", has_initial_state, "N")
      .dtype("has_initial_state", has_initial_state, {at::kBool})
      .contiguous("has_initial_state", has_initial_state);
}

void match_strided(Dims& d, std::string_view arg, const at::Tensor& t, std::string_view names,
                   std::initializer_list<at::ScalarType> allowed) {
  d.match(arg, t, names).dtype(arg, t, allowed).last_contiguous(arg, t);
}

void match_delta_state(Dims& d, const at::Tensor& state) {
  d.match("state", state, "S HV V K").dtype("state", state, {at::kFloat, at::kBFloat16}).contiguous("state", state, 1);
}

// The arguments that both delta rules share.
template <typename Params>
Dims match_delta_rule(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "q", p.q, "T H K", {at::kFloat, at::kBFloat16, at::kHalf});
  const at::ScalarType in = p.q.scalar_type();
  match_strided(d, "k", p.k, "T H K", {in});
  match_strided(d, "v", p.v, "T HV V", {in});
  d.require(d.sym("H") > 0 && d.sym("HV") % d.sym("H") == 0,
            c10::str("v: expected HV to be a multiple of H=", d.sym("H"), " (set by q), got HV=", d.sym("HV")));
  match_strided(d, "g", p.g, "T HV", {at::kFloat});
  match_strided(d, "beta", p.beta, "T HV", {at::kFloat, in});
  match_delta_state(d, p.state);
  bind_sequences(d, p.cu_seqlens);
  match_host_copy(d, p.cu_seqlens_cpu);
  match_strided(d, "out", p.out, "T HV V", {at::kFloat, in});
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
  match_flags(d, p.has_initial_state);
  require_metadata(d, "chunk_indices", p.chunk_indices);
  require_metadata(d, "chunk_offsets", p.chunk_offsets);
  match_indices(d, "chunk_indices", p.chunk_indices, "M 2");
  match_indices(d, "chunk_offsets", p.chunk_offsets, "N+1");
  return d;
}

Dims match(const PackedDecodeParams& p) {
  Dims d(Op<PackedDecodeParams>::name);
  match_strided(d, "mixed_qkv", p.mixed_qkv, "N D", {at::kFloat, at::kBFloat16, at::kHalf});
  const at::ScalarType in = p.mixed_qkv.scalar_type();
  match_strided(d, "a", p.a, "N HV", {in});
  match_strided(d, "b", p.b, "N HV", {in});
  d.match("A_log", p.A_log, "HV").dtype("A_log", p.A_log, {at::kFloat, in}).contiguous("A_log", p.A_log);
  d.match("dt_bias", p.dt_bias, "HV").dtype("dt_bias", p.dt_bias, {at::kFloat, in}).contiguous("dt_bias", p.dt_bias);
  match_delta_state(d, p.state);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_strided(d, "out", p.out, "N HV V", {at::kFloat, in});
  const c10::SymInt qk = d.sym("D") - d.sym("HV") * d.sym("V");
  d.require(qk > 0 && qk % (d.sym("K") * 2) == 0,
            c10::str("mixed_qkv: expected a width of 2 H K + HV V with K=", d.sym("K"), ", HV=", d.sym("HV"),
                     ", V=", d.sym("V"), " (set by state), got ", d.sym("D")));
  d.bind("H", qk / (d.sym("K") * 2), "mixed_qkv");
  d.require(d.sym("HV") % d.sym("H") == 0, c10::str("mixed_qkv: expected HV=", d.sym("HV"),
                                                    " to be a multiple of H, got H=", d.sym("H"), " from its width"));
  d.bind("T", d.sym("N"), "mixed_qkv");
  d.bind("L", 1, "state_indices");
  return d;
}

template <typename Params>
Dims match_conv(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "x", p.x, "T D", {at::kFloat, at::kBFloat16, at::kHalf});
  const at::ScalarType in = p.x.scalar_type();
  d.match("weight", p.weight, "D W").dtype("weight", p.weight, {in}).contiguous("weight", p.weight);
  d.require(d.sym("W") >= 2 && d.sym("W") <= 4, c10::str("weight: expected a width W of 2 to 4, got ", d.sym("W")));
  d.match("bias", p.bias, "D").dtype("bias", p.bias, {in}).contiguous("bias", p.bias);
  d.match("conv_state", p.conv_state, "S R D")
      .dtype("conv_state", p.conv_state, {in, at::kFloat})
      .contiguous("conv_state", p.conv_state, 1);
  bind_sequences(d, p.cu_seqlens);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_strided(d, "out", p.out, "T D", {in});
  d.require(!p.out.is_alias_of(p.x) || p.out.storage_offset() != p.x.storage_offset(),
            "out: expected memory of its own, got x's");
  return d;
}

void require_rows(Dims& d, int64_t new_rows) {
  d.require(d.sym("R") >= d.sym("W") - 2 + new_rows,
            c10::str("conv_state: expected R >= ", d.sym("W") - 2 + new_rows, " rows for W=", d.sym("W"), " and ",
                     new_rows, " tokens a sequence, got ", d.sym("R")));
}

Dims match(const CausalConv1dParams& p) {
  Dims d = match_conv(p);
  match_flags(d, p.has_initial_state);
  require_rows(d, 1);
  return d;
}

Dims match(const CausalConv1dUpdateParams& p) {
  Dims d = match_conv(p);
  match_indices(d, "num_accepted", p.num_accepted, "N");
  d.require(p.max_len >= 1, c10::str("max_len: expected at least 1, got ", p.max_len));
  require_rows(d, p.max_len);
  return d;
}

Dims match(const GdnGatingParams& p) {
  Dims d(Op<GdnGatingParams>::name);
  match_strided(d, "a", p.a, "T HV", {at::kFloat, at::kBFloat16, at::kHalf});
  const at::ScalarType in = p.a.scalar_type();
  match_strided(d, "b", p.b, "T HV", {in});
  d.match("A_log", p.A_log, "HV").dtype("A_log", p.A_log, {at::kFloat, in}).contiguous("A_log", p.A_log);
  d.match("dt_bias", p.dt_bias, "HV").dtype("dt_bias", p.dt_bias, {at::kFloat, in}).contiguous("dt_bias", p.dt_bias);
  d.match("g", p.g, "T HV").dtype("g", p.g, {at::kFloat}).contiguous("g", p.g);
  d.match("beta", p.beta, "T HV").dtype("beta", p.beta, {at::kFloat}).contiguous("beta", p.beta);
  return d;
}

Dims match(const L2NormParams& p) {
  Dims d(Op<L2NormParams>::name);
  match_strided(d, "x", p.x, "T H K", {at::kFloat, at::kBFloat16, at::kHalf});
  match_strided(d, "out", p.out, "T H K", {p.x.scalar_type()});
  return d;
}

Dims match(const RmsNormGatedParams& p) {
  Dims d(Op<RmsNormGatedParams>::name);
  match_strided(d, "x", p.x, "T HV V", {at::kFloat, at::kBFloat16, at::kHalf});
  match_strided(d, "z", p.z, "T HV V", {at::kFloat, at::kBFloat16, at::kHalf});
  const at::ScalarType in = p.z.scalar_type();
  d.match("weight", p.weight, "V").dtype("weight", p.weight, {at::kFloat, in}).contiguous("weight", p.weight);
  match_strided(d, "out", p.out, "T HV V", {in});
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

// ---- the choice of a backend ----------------------------------------------------------------------------------------

const Backend* find_backend(std::string_view name) {
  for (const Backend* b : backends()) {
    if (b->name() == name) return b;
  }
  return nullptr;
}

// Why no backend of this name is here; throws for a name that the project does not know.
std::string absence(std::string_view context, std::string_view name) {
  for (const AbsentBackend& absent : absent_backends()) {
    if (absent.name == name) return absent.why;
  }
  throw UnsupportedError(c10::str("[", context, "] backend: expected auto or one of ",
                                  c10::Join(", ", available_backends()), ", got '", name, "'"));
}

struct DefaultBackends {
  std::mutex mutex;
  std::array<std::string, 2> name;

  DefaultBackends() {
    const auto from_environment = [](const char* variable) {
      const char* value = std::getenv(variable);
      return std::string(value != nullptr && *value != '\0' ? value : "auto");
    };
    name = {from_environment("XGDN_PREFILL_BACKEND"), from_environment("XGDN_DECODE_BACKEND")};
  }
};

DefaultBackends& defaults() {
  static DefaultBackends instance;
  return instance;
}

std::array<std::atomic<const Backend*>, kOpNames.size()>& last_used() {
  static std::array<std::atomic<const Backend*>, kOpNames.size()> instance{};
  return instance;
}

const at::Tensor& primary(const RecurrentGatedDeltaRuleParams& p) {
  return p.q;
}
const at::Tensor& primary(const ChunkGatedDeltaRuleParams& p) {
  return p.q;
}
const at::Tensor& primary(const PackedDecodeParams& p) {
  return p.mixed_qkv;
}
const at::Tensor& primary(const CausalConv1dParams& p) {
  return p.x;
}
const at::Tensor& primary(const CausalConv1dUpdateParams& p) {
  return p.x;
}
const at::Tensor& primary(const GdnGatingParams& p) {
  return p.a;
}
const at::Tensor& primary(const L2NormParams& p) {
  return p.x;
}
const at::Tensor& primary(const RmsNormGatedParams& p) {
  return p.x;
}

template <typename Params, typename Shape>
std::optional<std::string> why_not(const Backend& b, const Params& p, const Shape& s) {
  if (auto sentence = b.why_not_device(primary(p).device())) return sentence;
  return b.why_not(p, s);
}

template <typename Params, typename Shape>
const Backend& select(const Params& p, const Shape& s) {
  constexpr std::string_view op = Op<Params>::name;
  const std::string name = p.backend == "auto" ? default_backend(Op<Params>::phase) : p.backend;
  if (name != "auto") {
    const Backend* b = find_backend(name);
    const std::optional<std::string> sentence = b != nullptr ? why_not(*b, p, s) : absence(op, name);
    if (!sentence) return *b;
    throw UnsupportedError(c10::str("[", op, "] backend ", name, " cannot serve this call: ", *sentence));
  }
  std::string sentences;
  for (const Backend* b : backends()) {
    const std::optional<std::string> sentence = why_not(*b, p, s);
    if (!sentence) return *b;
    sentences += c10::str("; ", b->name(), ": ", *sentence);
  }
  for (const AbsentBackend& absent : absent_backends()) sentences += c10::str("; ", absent.name, ": ", absent.why);
  throw UnsupportedError(c10::str("[", op, "] no backend can serve this call", sentences));
}

template <typename Params>
void dispatch(const Params& p) {
  const auto s = shape(p, match(p));
  const Backend& backend = select(p, s);
  backend.run(p, s);
  last_used()[Op<Params>::index].store(&backend, std::memory_order_relaxed);
}

// ---- index values ---------------------------------------------------------------------------------------------------

class IndexChecker {
 public:
  explicit IndexChecker(std::string_view op) : op_(op) {}

  void cu_seqlens(const at::Tensor& t, int64_t num_tokens) const {
    const int32_t* v = t.data_ptr<int32_t>();
    const int64_t n = t.numel();
    if (v[0] != 0) fail("cu_seqlens", "to start at 0", v[0], 0);
    for (int64_t i = 1; i < n; ++i) {
      if (v[i] < v[i - 1]) fail("cu_seqlens", c10::str("values that never fall (", v[i - 1], " before)"), v[i], i);
    }
    if (v[n - 1] != num_tokens) fail("cu_seqlens", c10::str("to end at T=", num_tokens), v[n - 1], n - 1);
  }

  void slots(std::string_view arg, const at::Tensor& t, int64_t num_slots) const {
    range(arg, t, kPadSlot, num_slots - 1, c10::str("a slot 0..", num_slots - 1, " or ", kPadSlot, " for padding"));
  }

  void range(std::string_view arg, const at::Tensor& t, int64_t low, int64_t high, const std::string& what) const {
    const int32_t* v = t.data_ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (v[i] < low || v[i] > high) fail(arg, what, v[i], i);
    }
  }

  // No slot may be written twice, nor written by one sequence and read by another.
  void writes(std::string_view arg, const at::Tensor& reads, const at::Tensor& writes, int64_t num_slots) const {
    const int32_t* r = reads.data_ptr<int32_t>();
    const int32_t* w = writes.data_ptr<int32_t>();
    std::vector<int64_t> writer(static_cast<size_t>(num_slots), -1);
    for (int64_t i = 0; i < writes.numel(); ++i) {
      if (w[i] == kPadSlot || r[i] == kPadSlot) continue;
      if (writer[w[i]] >= 0)
        fail(arg, c10::str("each slot to be written once (row ", writer[w[i]], " writes it too)"), w[i], i);
      writer[w[i]] = i;
    }
    for (int64_t i = 0; i < reads.numel(); ++i) {
      if (r[i] == kPadSlot) continue;
      const int64_t other = writer[r[i]];
      if (other >= 0 && other != i) {
        fail("state_indices", c10::str("a slot that no other row writes (row ", other, " does)"), r[i], i);
      }
    }
  }

  [[noreturn]] void fail(std::string_view arg, const std::string& expected, int64_t got, int64_t index) const {
    throw RangeError(c10::str("[", op_, "] ", arg, ": expected ", expected, ", got ", got, " at index ", index));
  }

 private:
  std::string_view op_;
};

template <typename Params>
void check_pool_indices(const IndexChecker& c, const Params& p, int64_t num_slots) {
  c.slots("state_indices", p.state_indices, num_slots);
  if (p.write_indices) c.slots("write_indices", *p.write_indices, num_slots);
  c.writes(p.write_indices ? "write_indices" : "state_indices", p.state_indices,
           p.write_indices.value_or(p.state_indices), num_slots);
}

// Every entry of a verification table belongs to one sequence.
void check_table(const IndexChecker& c, const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  c.slots("state_indices", p.state_indices, s.S);
  c.range("num_accepted", *p.num_accepted, 1, s.L, c10::str("1..L=", s.L));
  const int32_t* cu = p.cu_seqlens.data_ptr<int32_t>();
  for (int64_t n = 0; n < s.N; ++n) {
    if (cu[n + 1] - cu[n] > s.L)
      c.fail("cu_seqlens", c10::str("sequences of at most L=", s.L, " tokens"), cu[n + 1] - cu[n], n);
  }
  const int32_t* table = p.state_indices.data_ptr<int32_t>();
  std::vector<bool> taken(static_cast<size_t>(s.S), false);
  for (int64_t i = 0; i < s.N * s.L; ++i) {
    if (table[i] == kPadSlot) continue;
    if (taken[table[i]]) c.fail("state_indices", "each slot once in the table", table[i], i);
    taken[table[i]] = true;
  }
}

}  // namespace

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p) {
  dispatch(p);
}
void chunk_gated_delta_rule(const ChunkGatedDeltaRuleParams& p) {
  dispatch(p);
}
void packed_decode(const PackedDecodeParams& p) {
  dispatch(p);
}
void causal_conv1d(const CausalConv1dParams& p) {
  dispatch(p);
}
void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  dispatch(p);
}
void gdn_gating(const GdnGatingParams& p) {
  dispatch(p);
}
void l2_norm(const L2NormParams& p) {
  dispatch(p);
}
void rms_norm_gated(const RmsNormGatedParams& p) {
  dispatch(p);
}

void npu_recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p) {
  RecurrentGatedDeltaRuleParams on_npu = p;
  on_npu.backend = "npu";
  dispatch(on_npu);
}

void check(const RecurrentGatedDeltaRuleParams& p) {
  match(p);
}
void check(const ChunkGatedDeltaRuleParams& p) {
  match(p);
}
void check(const PackedDecodeParams& p) {
  match(p);
}
void check(const CausalConv1dParams& p) {
  match(p);
}
void check(const CausalConv1dUpdateParams& p) {
  match(p);
}
void check(const GdnGatingParams& p) {
  match(p);
}
void check(const L2NormParams& p) {
  match(p);
}
void check(const RmsNormGatedParams& p) {
  match(p);
}

void check_indices(const RecurrentGatedDeltaRuleParams& p) {
  const GdnShape s = shape(p, match(p));
  const IndexChecker c(Op<RecurrentGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  if (p.num_accepted) {
    check_table(c, p, s);
  } else {
    check_pool_indices(c, p, s.S);
  }
}

void check_indices(const ChunkGatedDeltaRuleParams& p) {
  const GdnShape s = shape(p, match(p));
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

void check_indices(const PackedDecodeParams& p) {
  check_pool_indices(IndexChecker(Op<PackedDecodeParams>::name), p, shape(p, match(p)).S);
}

void check_indices(const CausalConv1dParams& p) {
  const ConvShape s = shape(p, match(p));
  const IndexChecker c(Op<CausalConv1dParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
}

void check_indices(const CausalConv1dUpdateParams& p) {
  const ConvShape s = shape(p, match(p));
  const IndexChecker c(Op<CausalConv1dUpdateParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
  const int64_t most = s.R - s.W + 2;  // rows 0..R-1 hold the history of at most this many acceptance counts
  if (p.num_accepted) c.range("num_accepted", *p.num_accepted, 1, most, c10::str("1..", most));
  const int32_t* cu = p.cu_seqlens.data_ptr<int32_t>();
  for (int64_t n = 0; n < s.N; ++n) {
    const int64_t len = cu[n + 1] - cu[n];
    if (len > p.max_len) c.fail("cu_seqlens", c10::str("sequences of at most max_len=", p.max_len, " tokens"), len, n);
  }
}

void check_backend_name(const std::string& name) {
  if (name == "auto" || find_backend(name) != nullptr) return;
  throw UnsupportedError(c10::str("backend ", name, ": ", absence("backend", name)));
}

void set_default_backend(Phase phase, const std::string& name) {
  check_backend_name(name);
  std::lock_guard lock(defaults().mutex);
  defaults().name[static_cast<size_t>(phase)] = name;
}

std::string default_backend(Phase phase) {
  std::lock_guard lock(defaults().mutex);
  return defaults().name[static_cast<size_t>(phase)];
}

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const Backend* b : backends()) {
    if (!b->why_unavailable()) names.emplace_back(b->name());
  }
  return names;
}

std::string last_backend(std::string_view op) {
  for (size_t i = 0; i < kOpNames.size(); ++i) {
    if (kOpNames[i] != op) continue;
    const Backend* b = last_used()[i].load(std::memory_order_relaxed);
    return b != nullptr ? std::string(b->name()) : "";
  }
  throw UnsupportedError(
      c10::str("[last_backend] op: expected one of ", c10::Join(", ", kOpNames), ", got '", op, "'"));
}

namespace {

template <typename Params>
void report(std::vector<BackendReport>& rows, const Params& sample) {
  const auto s = shape(sample, match(sample));
  const std::string chosen = default_backend(Op<Params>::phase);
  bool found = false;
  for (const Backend* b : backends()) {
    BackendReport row{std::string(Op<Params>::name), std::string(b->name()), why_not(*b, sample, s), false};
    row.is_selected = !found && !row.why_not && (chosen == "auto" || chosen == b->name());
    found = found || row.is_selected;
    rows.push_back(row);
  }
  for (const AbsentBackend& absent : absent_backends()) {
    rows.push_back({std::string(Op<Params>::name), absent.name, absent.why, false});
  }
}

}  // namespace

std::vector<BackendReport> doctor() {
  constexpr int64_t kHeads = 1;
  constexpr int64_t kDim = 128;
  const at::Tensor head = at::zeros({1, kHeads, kDim}, at::kBFloat16);
  const at::Tensor gate = at::zeros({1, kHeads}, at::kFloat);
  const at::Tensor logit = at::zeros({1, kHeads}, at::kBFloat16);
  const at::Tensor per_head = at::zeros({kHeads}, at::kFloat);
  const at::Tensor state = at::zeros({1, kHeads, kDim, kDim}, at::kFloat);
  const at::Tensor row = at::zeros({1, 3 * kDim}, at::kBFloat16);
  const at::Tensor taps = at::zeros({3 * kDim, 4}, at::kBFloat16);
  const at::Tensor conv_state = at::zeros({1, 3, 3 * kDim}, at::kBFloat16);
  const at::Tensor slot = at::zeros({1}, at::kInt);
  at::Tensor cu_seqlens = at::zeros({2}, at::kInt);
  cu_seqlens.data_ptr<int32_t>()[1] = 1;
  const ChunkMetadata chunk = build_chunk_metadata({1}, kHeads);
  const at::Tensor out_row = at::empty_like(row);

  std::vector<BackendReport> rows;
  report<RecurrentGatedDeltaRuleParams>(rows, {.q = head,
                                               .k = head,
                                               .v = head,
                                               .g = gate,
                                               .beta = gate,
                                               .state = state,
                                               .cu_seqlens = cu_seqlens,
                                               .state_indices = slot,
                                               .out = head});
  report<ChunkGatedDeltaRuleParams>(rows, {.q = head,
                                           .k = head,
                                           .v = head,
                                           .g = gate,
                                           .beta = gate,
                                           .state = state,
                                           .cu_seqlens = cu_seqlens,
                                           .state_indices = slot,
                                           .chunk_indices = chunk.chunk_indices_chunk64,
                                           .chunk_offsets = chunk.chunk_offsets_chunk64,
                                           .out = head});
  report<PackedDecodeParams>(rows, {.mixed_qkv = row,
                                    .a = logit,
                                    .b = logit,
                                    .A_log = per_head,
                                    .dt_bias = per_head,
                                    .state = state,
                                    .state_indices = slot,
                                    .out = head});
  report<CausalConv1dParams>(rows, {.x = row,
                                    .weight = taps,
                                    .conv_state = conv_state,
                                    .cu_seqlens = cu_seqlens,
                                    .state_indices = slot,
                                    .out = out_row});
  report<CausalConv1dUpdateParams>(rows, {.x = row,
                                          .weight = taps,
                                          .conv_state = conv_state,
                                          .cu_seqlens = cu_seqlens,
                                          .state_indices = slot,
                                          .out = out_row});
  report<GdnGatingParams>(rows,
                          {.a = logit, .b = logit, .A_log = per_head, .dt_bias = per_head, .g = gate, .beta = gate});
  report<L2NormParams>(rows, {.x = head, .out = head});
  report<RmsNormGatedParams>(rows, {.x = head, .z = head, .weight = at::zeros({kDim}, at::kFloat), .out = head});
  return rows;
}

}  // namespace xgdn::kernel
