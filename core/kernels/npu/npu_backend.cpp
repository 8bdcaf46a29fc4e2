// SPDX-License-Identifier: Apache-2.0
// Ascend through torch_npu: adapts a call to what the device's ops take, and nothing else.
//
//   ours                                   theirs
//   cu_seqlens                             lengths, in the convention that the probe found
//   a slot (or table row) per sequence     a slot per token; token 0's entry is also the one that is read
//   read and write slots, padding          one slot that is read and written: states are staged where they differ
//   raw q, k; beta f32 or bf16             l2-normalised q, k; beta bf16
//   any length                             at most 8 tokens: longer sequences take the chunk op, or pieces of 8
//
// Rounding: q and k are rounded to bf16 after the norm, beta to bf16, the read-out to bf16; the state in its own type.
#include "core/kernels/npu/npu_backend.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include "core/kernels/aten/indexing.h"
#include "core/kernels/npu/moe_experts.h"
#include "core/kernels/npu/paged_attention.h"
#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel {
namespace {

constexpr int64_t kMaxTokens = 8;       // of a sequence in one call of the recurrent op
constexpr int64_t kMaxHeads = 256;      // of the recurrent op
constexpr int64_t kMaxHeadDim = 256;    // of the recurrent op
constexpr int64_t kMaxChunkHeads = 64;  // of the chunk op
constexpr int64_t kChunkHeadDim = 128;  // of the chunk op

using Sentence = std::optional<std::string>;

// A row of one value, made once per device, dtype, value and power-of-two length.
at::Tensor constant(double value, int64_t length, const at::TensorOptions& options) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, double, int64_t>, at::Tensor> rows;
  int64_t capacity = 1;
  while (capacity < length) capacity *= 2;
  const std::lock_guard lock(mutex);
  at::Tensor& row =
      rows[{options.device().index(), static_cast<int>(c10::typeMetaToScalarType(options.dtype())), value, capacity}];
  if (!row.defined()) row = at::full({capacity}, value, options);
  return row.narrow(0, 0, length);
}

std::vector<int64_t> lengths_of(const at::Tensor& cu_seqlens_cpu) {
  const int32_t* cu = cu_seqlens_cpu.const_data_ptr<int32_t>();
  std::vector<int64_t> lengths;
  for (int64_t n = 0; n + 1 < cu_seqlens_cpu.numel(); ++n) lengths.push_back(cu[n + 1] - cu[n]);
  return lengths;
}

int64_t longest(const std::vector<int64_t>& lengths) {
  return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
}

at::Tensor l2_normalised(const at::Tensor& x) {
  // x / sqrt(sum x^2 + eps) = K^-0.5 x / sqrt(mean x^2 + eps / K): an RMS norm, one launch.
  const int64_t K = x.size(-1);
  const double inverse_root = 1.0 / std::sqrt(static_cast<double>(K));
  return npu::rms_norm(x, constant(inverse_root, K, x.options()), kL2NormEps / static_cast<double>(K));
}

// x where valid [T], else zeros, whatever x holds there.
at::Tensor masked(const at::Tensor& x, const at::Tensor& valid) {
  return at::where(along(valid, x), x, at::zeros({}, x.options()));
}

// The tokens of a call as the device's ops take them.
struct Tokens {
  at::Tensor q, k, v, g, beta;

  Tokens rows(const at::Tensor& index) const {
    return {q.index_select(0, index), k.index_select(0, index), v.index_select(0, index), g.index_select(0, index),
            beta.index_select(0, index)};
  }

  // Padding may hold anything; the device's ops want numbers.
  Tokens without_padding(const at::Tensor& valid) const {
    return {masked(q, valid), masked(k, valid), masked(v, valid), masked(g, valid), masked(beta, valid)};
  }
};

template <typename Params>
Tokens tokens_of(const Params& p) {
  const auto key = [&](const at::Tensor& t) { return p.use_qk_l2norm_in_kernel ? l2_normalised(t) : t.contiguous(); };
  return {key(p.q), key(p.k), p.v.contiguous(), p.g.contiguous(), p.beta.to(at::kBFloat16).contiguous()};
}

// g = -exp(A_log) softplus(a + dt_bias), fp32.
at::Tensor log_decay(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  const at::Tensor rate = at::exp(A_log.to(at::kFloat));
  const at::Tensor step = at::softplus(a + dt_bias.to(at::kFloat));
  return at::addcmul(constant(0, 1, rate.options()), step, rate, -1);
}

// The op reads and writes one slot per token: a call that does the same needs no staging.
bool is_in_place(const RecurrentGatedDeltaRuleParams& p) {
  return !p.num_accepted && !p.write_indices && !p.may_have_padding;
}

double scale_of(const std::optional<double>& scale, int64_t K) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(K)));
}

at::Tensor device_indices(const std::vector<int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, at::kLong).to(like.device());
}

// One call of the recurrent op: B sequences, lengths [B] i32, one slot per token.
at::Tensor call_recurrent(const Tokens& x, const at::Tensor& pool, const at::Tensor& lengths,
                          const at::Tensor& token_slots, double scale) {
  const npu::Capabilities& c = npu::capabilities();
  const at::Tensor given =
      c.lengths == npu::Lengths::kPerSequence ? lengths : at::cat({constant(0, 1, lengths.options()), lengths});
  return npu::recurrent(c.recurrent_op, {.q = x.q,
                                         .k = x.k,
                                         .v = x.v,
                                         .state = pool,
                                         .beta = x.beta,
                                         .scale = scale,
                                         .lengths = given,
                                         .state_indices = token_slots,
                                         .num_accepted = constant(1, lengths.size(0), lengths.options()),
                                         .g = x.g});
}

// All tokens of all sequences in as many calls as the longest needs pieces of 8. A later piece of a verification starts
// from the state after the token before it, which lies in that token's slot.
at::Tensor advance(const Tokens& x, const at::Tensor& pool, const at::Tensor& token_slots, const at::Tensor& cu_seqlens,
                   const std::vector<int64_t>& lengths, bool is_verification, double scale) {
  const bool has_empty = std::find(lengths.begin(), lengths.end(), 0) != lengths.end();
  if (!has_empty && longest(lengths) <= kMaxTokens) {
    const bool is_one_each = static_cast<int64_t>(lengths.size()) == x.q.size(0);
    const at::Tensor counts = is_one_each ? constant(1, x.q.size(0), cu_seqlens.options())
                                          : cu_seqlens.slice(0, 1) - cu_seqlens.slice(0, 0, -1);
    return call_recurrent(x, pool, counts, token_slots, scale);
  }
  at::Tensor out = at::empty_like(x.v);
  for (int64_t begin = 0; begin < longest(lengths); begin += kMaxTokens) {
    std::vector<int64_t> rows, firsts, counts;
    int64_t start = 0;
    for (int64_t length : lengths) {
      const int64_t count = std::clamp<int64_t>(length - begin, 0, kMaxTokens);
      if (count > 0) {
        firsts.push_back(start + begin);
        counts.push_back(count);
      }
      for (int64_t t = 0; t < count; ++t) rows.push_back(start + begin + t);
      start += length;
    }
    const at::Tensor index = device_indices(rows, x.q);
    if (is_verification && begin > 0) {
      const at::Tensor first = device_indices(firsts, x.q);
      pool.index_put_({token_slots.index_select(0, first).to(at::kLong)},
                      pool.index({token_slots.index_select(0, first - 1).to(at::kLong)}));
    }
    out.index_copy_(0, index,
                    call_recurrent(x.rows(index), pool, device_indices(counts, x.q).to(at::kInt),
                                   token_slots.index_select(0, index), scale));
  }
  return out;
}

class NpuBackend final : public Backend {
 public:
  using Backend::run;
  using Backend::why_not;

  std::string_view name() const override { return "npu"; }

  Sentence why_unavailable() const override { return npu::why_no_device(); }

  Sentence why_not_device(c10::Device device) const override {
    if (const Sentence none = why_unavailable()) return none;
    if (device.is_privateuseone()) return std::nullopt;
    return c10::str("it serves npu tensors, these are on ", device.str(), " (", npu::capabilities().describe(), ")");
  }

  Sentence why_not(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    if (Sentence sentence = why_not_recurrent(p.q, p.state, s)) return sentence;
    return why_not_lengths(p.cu_seqlens_cpu);
  }

  Sentence why_not(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override {
    const npu::Capabilities& c = npu::capabilities();
    if (Sentence sentence = why_not_dtype(p.q, p.state, c.why_not_chunk_f32_state)) return sentence;
    if (!c.why_not_chunk.empty()) return c.why_not_chunk;
    if (s.H > kMaxChunkHeads || s.HV > kMaxChunkHeads) {
      return c10::str("the chunk op takes at most ", kMaxChunkHeads, " heads, got H=", s.H, " HV=", s.HV);
    }
    const bool is_usual = s.K == kChunkHeadDim && s.V == kChunkHeadDim;
    if (!is_usual && (s.K != s.V || s.K > kChunkHeadDim || !c.why_not_chunk_head_dims.empty())) {
      return c10::str("the chunk op takes head dims K = V = ", kChunkHeadDim,
                      c.why_not_chunk_head_dims.empty() ? " or below" : "", ", got K=", s.K, " V=", s.V);
    }
    return why_not_lengths(p.cu_seqlens_cpu);
  }

  Sentence why_not(const PackedDecodeParams& p, const GdnShape& s) const override {
    return why_not_recurrent(p.mixed_qkv, p.state, s);
  }

  Sentence why_not(const PagedAttentionParams& p, const AttentionShape& s) const override {
    return npu::why_not_attention(p, s);
  }

  Sentence why_not(const MoeExpertsParams& p, const ExpertsShape& s) const override {
    return npu::why_not_experts(p, s);
  }

  void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    const std::vector<int64_t> lengths = lengths_of(*p.cu_seqlens_cpu);
    const Tokens x = tokens_of(p);
    const double scale = scale_of(p.scale, s.K);
    if (s.T == 0) {
      copy_states(p, s);
      return;
    }
    if (p.num_accepted) {
      verify(p, s, x, lengths, scale);
    } else if (!is_in_place(p)) {
      decode_staged(p, s, x, lengths, scale);
    } else {
      p.out.copy_(advance(x, p.state, token_slots(p, s), p.cu_seqlens, lengths, /*is_verification=*/false, scale));
    }
  }

  void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override;
  void run(const PackedDecodeParams& p, const GdnShape& s) const override;
  void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const override;
  void run(const GdnGatingParams& p, const GdnShape& s) const override;
  void run(const RmsNormGatedParams& p, const GdnShape& s) const override;
  void run(const PagedAttentionParams& p, const AttentionShape& s) const override { npu::run_attention(p, s); }
  void run(const MoeExpertsParams& p, const ExpertsShape& s) const override { npu::run_experts(p, s); }

 private:
  static Sentence why_not_dtype(const at::Tensor& in, const at::Tensor& state, const std::string& why_not_f32) {
    if (in.scalar_type() != at::kBFloat16) {
      return c10::str("it takes bf16 q, k and v, got ", c10::toString(in.scalar_type()));
    }
    if (state.scalar_type() == at::kFloat && !why_not_f32.empty()) {
      return c10::str("this CANN takes bf16 states, got a Float pool, which is never downcast (", why_not_f32, ")");
    }
    if (!state.is_contiguous()) return "it takes a contiguous pool, got one with a slot stride";
    return std::nullopt;
  }

  static Sentence why_not_recurrent(const at::Tensor& in, const at::Tensor& state, const GdnShape& s) {
    const npu::Capabilities& c = npu::capabilities();
    if (c.recurrent_op == nullptr) return c.why_not_recurrent;
    if (Sentence sentence = why_not_dtype(in, state, c.why_not_f32_state)) return sentence;
    if (s.H > kMaxHeads || s.HV > kMaxHeads || s.K > kMaxHeadDim || s.V > kMaxHeadDim) {
      return c10::str("the recurrent op takes at most ", kMaxHeads, " heads of at most ", kMaxHeadDim, ", got H=", s.H,
                      " HV=", s.HV, " K=", s.K, " V=", s.V);
    }
    if (s.T > s.S) return c10::str("the recurrent op takes at most as many tokens as slots, got T=", s.T, " S=", s.S);
    return std::nullopt;
  }

  static Sentence why_not_lengths(const std::optional<at::Tensor>& cu_seqlens_cpu) {
    if (cu_seqlens_cpu) return std::nullopt;
    return c10::str("its ops limit the length of a sequence (", kMaxTokens,
                    "), so the lengths must be known on the host: pass cu_seqlens_cpu");
  }

  // The slot of each token, [T] i32.
  static at::Tensor token_slots(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
    if (!p.num_accepted && s.T == s.N) return p.state_indices;
    const TokenPlaces places = token_places(p.cu_seqlens, s.T);
    return p.num_accepted ? p.state_indices.index({places.sequence, places.position})
                          : p.state_indices.index_select(0, places.sequence);
  }

  // No tokens: states may still move from read to write slots.
  static void copy_states(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
    if (p.num_accepted || !p.write_indices || s.N == 0) return;
    const at::Tensor read = p.state_indices.to(at::kLong);
    const at::Tensor write = p.write_indices->to(at::kLong);
    write_slots(p.state, write, read.ge(0).logical_and(write.ge(0)), p.state.index({read.clamp_min(0)}));
  }

  // States are copied to slots of their own, advanced there, and written where the call says.
  static void decode_staged(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s, const Tokens& x,
                            const std::vector<int64_t>& lengths, double scale) {
    const at::Tensor read = p.state_indices.to(at::kLong);
    const at::Tensor write = p.write_indices.value_or(p.state_indices).to(at::kLong);
    const at::Tensor sequence = token_places(p.cu_seqlens, s.T).sequence;
    // The op takes no more tokens than slots; the rows past N are never named.
    const at::Tensor rows = at::arange(std::max(s.N, s.T), read.options()).clamp_max(s.N - 1);
    const at::Tensor staged = p.state.index({read.clamp_min(0).index_select(0, rows)});
    const at::Tensor valid = read.ge(0).index_select(0, sequence);
    const at::Tensor out =
        advance(x.without_padding(valid), staged, sequence.to(at::kInt), p.cu_seqlens, lengths, false, scale);
    write_slots(p.state, write, read.ge(0).logical_and(write.ge(0)), staged.narrow(0, 0, s.N));
    p.out.copy_(masked(out, valid));
  }

  static void verify(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s, const Tokens& x,
                     const std::vector<int64_t>& lengths, double scale) {
    const at::Tensor column = p.num_accepted->to(at::kLong).unsqueeze(1) - 1;
    const at::Tensor table = p.state_indices.to(at::kLong);
    const at::Tensor read = table.gather(1, column).squeeze(1);
    const at::Tensor first = table.select(1, 0);
    const at::Tensor has_tokens = (p.cu_seqlens.slice(0, 1) - p.cu_seqlens.slice(0, 0, -1)).gt(0);
    const at::Tensor valid = read.ge(0).logical_and(has_tokens);
    if (!p.may_have_padding) {
      // Token 0 writes the table's first slot in any case, so the state to start from is put there.
      write_slots(p.state, first, valid, p.state.index({read.clamp_min(0)}));
      p.out.copy_(advance(x, p.state, token_slots(p, s), p.cu_seqlens, lengths, /*is_verification=*/true, scale));
      return;
    }
    const TokenPlaces places = token_places(p.cu_seqlens, s.T);
    const at::Tensor staged_slots = places.sequence * s.L + places.position;  // slot n L + t of the staged pool
    const at::Tensor staged = p.state.index({read.clamp_min(0)}).repeat_interleave(s.L, 0);
    const at::Tensor is_read = read.ge(0).index_select(0, places.sequence);
    const at::Tensor out =
        advance(x.without_padding(is_read), staged, staged_slots.to(at::kInt), p.cu_seqlens, lengths, true, scale);
    const at::Tensor target = table.index({places.sequence, places.position});
    write_slots(p.state, target, target.ge(0).logical_and(is_read), staged.index({staged_slots}));
    p.out.copy_(masked(out, is_read));
  }
};

void NpuBackend::run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const {
  if (s.N == 0) return;
  const std::vector<int64_t> lengths = lengths_of(*p.cu_seqlens_cpu);
  const at::Tensor read = p.state_indices.to(at::kLong);
  const at::Tensor write = p.write_indices ? p.write_indices->to(at::kLong) : read;
  at::Tensor states = p.state.index({read.clamp_min(0)});
  if (p.has_initial_state) {
    states = at::where(along(*p.has_initial_state, states), states, at::zeros({}, states.options()));
  }
  const at::Tensor is_read = read.ge(0);
  const bool is_all_in_place = !p.may_have_padding && !p.write_indices;
  std::vector<int64_t> present;
  for (size_t n = 0; n < lengths.size(); ++n) {
    if (lengths[n] > 0) present.push_back(static_cast<int64_t>(n));
  }
  if (!present.empty()) {
    const bool is_all = present.size() == lengths.size();
    const at::Tensor counts = p.cu_seqlens.slice(0, 1) - p.cu_seqlens.slice(0, 0, -1);
    const at::Tensor index = is_all ? at::Tensor() : device_indices(present, p.q);
    const Tokens given = tokens_of(p);
    const at::Tensor valid =
        p.may_have_padding ? is_read.index_select(0, token_places(p.cu_seqlens, s.T).sequence) : at::Tensor();
    const Tokens x = p.may_have_padding ? given.without_padding(valid) : given;
    const auto [out, final_states] = npu::chunk({.q = x.q,
                                                 .k = x.k,
                                                 .v = x.v,
                                                 .beta = x.beta,
                                                 .initial_state = is_all ? states : states.index_select(0, index),
                                                 .lengths = is_all ? counts : counts.index_select(0, index),
                                                 .scale = scale_of(p.scale, s.K),
                                                 .g = x.g});
    states = is_all ? final_states : states.index_copy(0, index, final_states);
    p.out.copy_(p.may_have_padding ? masked(out, valid) : out);
  }
  if (is_all_in_place) {
    p.state.index_copy_(0, write, states);
    return;
  }
  write_slots(p.state, write, is_read.logical_and(write.ge(0)), states);
}

void NpuBackend::run(const PackedDecodeParams& p, const GdnShape& s) const {
  if (s.N == 0) return;
  const int64_t key_width = s.H * s.K;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return p.mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  const at::Tensor first_tokens = at::arange(s.N + 1, at::kInt);
  RecurrentGatedDeltaRuleParams decode{.q = heads(0, s.H, s.K),
                                       .k = heads(key_width, s.H, s.K),
                                       .v = heads(2 * key_width, s.HV, s.V),
                                       .g = log_decay(p.a, p.A_log, p.dt_bias),
                                       .beta = at::sigmoid(p.b),
                                       .state = p.state,
                                       .state_indices = p.state_indices,
                                       .out = p.out,
                                       .write_indices = p.write_indices,
                                       .cu_seqlens_cpu = first_tokens,
                                       .may_have_padding = p.may_have_padding,
                                       .scale = p.scale,
                                       .use_qk_l2norm_in_kernel = p.use_qk_l2norm_in_kernel};
  decode.cu_seqlens = is_in_place(decode) ? p.state_indices  // only its type and device matter: one token a sequence
                                          : at::arange(s.N + 1, p.state_indices.options());
  run(decode, s);
}

// One token a sequence without padding: six launches instead of the default's gathers. Rounding: products and sum in
// fp32, the sum to the input's type before the activation.
void NpuBackend::run(const CausalConv1dUpdateParams& p, const ConvShape& s) const {
  const bool is_plain = s.T == s.N && p.max_len == 1 && !p.num_accepted && !p.write_indices && !p.may_have_padding &&
                        s.R == s.W - 1 && p.conv_state.scalar_type() == p.x.scalar_type();
  if (!is_plain || s.N == 0) {
    Backend::run(p, s);
    return;
  }
  const at::Tensor window = at::cat({p.conv_state.index_select(0, p.state_indices), p.x.unsqueeze(1)}, 1);  // [N, W, D]
  const at::Tensor taps = p.weight.t().to(at::kFloat);
  at::Tensor sum = at::sum(window * taps, {1}, /*keepdim=*/false, p.x.scalar_type());
  if (p.bias) sum = sum + *p.bias;
  if (p.silu) {
    at::silu_out(const_cast<at::Tensor&>(p.out), sum);
  } else {
    p.out.copy_(sum);
  }
  p.conv_state.index_copy_(0, p.state_indices.to(at::kLong), window.slice(1, 1));
}

void NpuBackend::run(const GdnGatingParams& p, const GdnShape&) const {
  p.g.copy_(log_decay(p.a, p.A_log, p.dt_bias));
  p.beta.copy_(at::sigmoid(p.b.to(at::kFloat)));
}

// Rounding: the norm to x's type, silu(z) to z's, their product to the output's.
void NpuBackend::run(const RmsNormGatedParams& p, const GdnShape&) const {
  if (p.x.scalar_type() != p.z.scalar_type()) {
    Backend::run(p, {});
    return;
  }
  at::mul_out(const_cast<at::Tensor&>(p.out), npu::rms_norm(p.x, p.weight, p.eps), at::silu(p.z));
}

}  // namespace

const Backend* npu_backend() {
  static const NpuBackend backend;
  return &backend;
}

}  // namespace xgdn::kernel
