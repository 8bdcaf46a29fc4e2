// SPDX-License-Identifier: Apache-2.0
// Attention over packed sequences of ragged lengths (layout TND), as the vendor documents it: query token i of a
// sequence of Sq tokens sees keys 0..i + Skv - Sq of the sequence's own Skv (sparse_mode 3), or all of them (no mask).
// In fp32, one sequence and head after the other. The softmax's maxima and sums, which only a backward pass reads, stay
// poisoned. Ascend 950 has an entry point of its own, with the same sums. The switch STRICT=0 lifts the documented
// limits.
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>

#include <cmath>

#include "checks.h"
#include "op.h"

namespace emulated_cann {
namespace {

constexpr int64_t kMaskSize = 2048;      // of the compressed causal mask
constexpr int64_t kMaxTokens = 1 << 20;  // 1M
constexpr int64_t kMaxHeadDim = 768;
constexpr int64_t kMaxHeads = 256;

void check_ends(const char* name, const IntArray& ends, int64_t num_tokens) {
  require(!ends.empty(), kInvalidParameter, name, ": expected at least one sequence, got none");
  int64_t before = 0;
  for (const int64_t end : ends) {
    require(end >= before, kInvalidParameter, name, ": expected values that never fall, got ", end, " after ", before);
    before = end;
  }
  require(before == num_tokens, kInvalidParameter, name, ": expected to end at T=", num_tokens, ", got ", before);
}

void check_mask(const OptionalTensor& mask, int64_t sparse_mode) {
  if (!mask) return;
  require(sparse_mode == 3, kInvalidParameter, "sparse_mode ", sparse_mode, " is not emulated with a mask");
  check_type("attenMask", mask, {at::kBool, at::kByte});
  check_shape("attenMask", mask, {kMaskSize, kMaskSize});
  const Tensor above = at::ones({kMaskSize, kMaskSize}, at::kBool).triu(1);
  require_value(mask->to(at::kBool).equal(above), "attenMask: expected true above the diagonal and false elsewhere");
}

// What both entry points take of their arguments.
struct Packed {
  Tensor q, k, v;
  OptionalTensor mask;
  IntArray q_ends, kv_ends;
  double scale;
  int64_t num_heads;
  Tensor out;
};

struct Switches {
  const char* layout;
  int64_t sparse_mode;
  bool is_plain;  // no position shift, dropout, padding mask or prefix
  int64_t most_sequences;
};

bool is_absent(const std::optional<IntArray>& values) {
  return !values || values->empty();
}

void check_packed(const Packed& p, const Switches& s) {
  const auto& [q, k, v, mask, q_ends, kv_ends, scale, num_heads, out] = p;
  require(std::string_view(s.layout) == "TND", kInvalidParameter, "inputLayout ", s.layout, " is not emulated");
  require(s.is_plain, kInvalidParameter, "pse, dropout, padding masks and prefixes are not emulated");
  require(q.dim() == 3 && k.dim() == 3, kInvalidParameter, "query and key: expected [T, N, D], got ", q.sizes(),
          " and ", k.sizes());
  check_type("query", q, {at::kHalf, at::kBFloat16, at::kFloat});
  check_type("key", k, {q.scalar_type()});
  check_type("value", v, {q.scalar_type()});
  check_type("attentionOut", out, {q.scalar_type()});
  check_shape("key", k, {k.size(0), k.size(1), q.size(2)});
  check_shape("value", v, k.sizes());
  check_shape("attentionOut", out, q.sizes());
  require(num_heads == q.size(1), kInvalidParameter, "headNum: expected ", q.size(1), ", got ", num_heads);
  require(k.size(1) > 0 && num_heads % k.size(1) == 0, kInvalidParameter, "N of query: expected a multiple of ",
          k.size(1), ", got ", num_heads);
  require(q_ends.size() == kv_ends.size(), kInvalidParameter,
          "actualSeqQLen and actualSeqKvLen: expected as many, got ", q_ends.size(), " and ", kv_ends.size());
  check_ends("actualSeqQLen", q_ends, q.size(0));
  check_ends("actualSeqKvLen", kv_ends, k.size(0));
  check_mask(mask, s.sparse_mode);
  if (!strict()) return;
  const auto limit = [](const char* name, int64_t value, int64_t most) {
    require(value >= 1 && value <= most, kInvalidParameter, name, ": expected 1..", most, ", got ", value);
  };
  limit("T of query", q.size(0), kMaxTokens);
  limit("T of key", k.size(0), kMaxTokens);
  limit("N of query", num_heads, kMaxHeads);
  limit("D", q.size(2), kMaxHeadDim);
  limit("the number of sequences", static_cast<int64_t>(q_ends.size()), s.most_sequences);
}

// q [Sq, D], k and v [Skv, D], in fp32. Keys that a token does not see never enter a sum.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool is_causal) {
  const int64_t rows = q.size(0);
  const int64_t columns = k.size(0);
  Tensor logits = at::matmul(q, k.t()) * scale;
  const Tensor hidden = at::ones({rows, columns}, at::kBool).triu(columns - rows + 1);
  if (is_causal) logits = logits.masked_fill(hidden, -INFINITY);
  const Tensor weights = logits.softmax(-1);
  return at::matmul(weights, v);
}

void run_packed(const Packed& p) {
  const auto& [q, k, v, mask, q_ends, kv_ends, scale, num_heads, out] = p;
  const int64_t group = num_heads / k.size(1);
  int64_t q_begin = 0;
  int64_t kv_begin = 0;
  for (size_t n = 0; n < q_ends.size(); ++n) {
    const int64_t Sq = q_ends[n] - q_begin;
    const int64_t Skv = kv_ends[n] - kv_begin;
    require_value(!mask || Sq <= Skv, c10::str("sequence ", n, ": expected at most Skv=", Skv, " queries, got ", Sq));
    const auto head = [](const Tensor& t, int64_t begin, int64_t count, int64_t h) {
      return t.narrow(0, begin, count).select(1, h);
    };
    for (int64_t h = 0; h < num_heads && Sq > 0; ++h) {
      head(out, q_begin, Sq, h)
          .copy_(attend(head(q, q_begin, Sq, h).to(at::kFloat), head(k, kv_begin, Skv, h / group).to(at::kFloat),
                        head(v, kv_begin, Skv, h / group).to(at::kFloat), scale, mask.has_value()));
    }
    q_begin = q_ends[n];
    kv_begin = kv_ends[n];
  }
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& pse,
                     const OptionalTensor& drop_mask, const OptionalTensor& padding_mask, const OptionalTensor& mask,
                     const std::optional<IntArray>& prefix, const IntArray& q_ends, const IntArray& kv_ends,
                     double scale, double keep, int64_t, int64_t, int64_t num_heads, const char* layout, int64_t,
                     int64_t sparse_mode, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const Tensor& out) {
  const bool is_plain = !pse && !drop_mask && !padding_mask && is_absent(prefix) && keep == 1.0;
  check_packed({q, k, v, mask, q_ends, kv_ends, scale, num_heads, out},
               {.layout = layout, .sparse_mode = sparse_mode, .is_plain = is_plain, .most_sequences = 1024});
}

void run_attention(Tensor q, Tensor k, Tensor v, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor mask,
                   std::optional<IntArray>, IntArray q_ends, IntArray kv_ends, double scale, double, int64_t, int64_t,
                   int64_t num_heads, const char*, int64_t, int64_t, OptionalTensor, OptionalTensor, OptionalTensor,
                   Tensor out) {
  run_packed({q, k, v, mask, q_ends, kv_ends, scale, num_heads, out});
}

void check_attention950(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& pse,
                        const OptionalTensor& drop_mask, const OptionalTensor& padding_mask, const OptionalTensor& mask,
                        const OptionalTensor& q_rope, const OptionalTensor& k_rope, const OptionalTensor& q_scale,
                        const OptionalTensor& k_scale, const OptionalTensor& v_scale, const OptionalTensor& sink,
                        const std::optional<IntArray>& prefix, const IntArray& q_ends, const IntArray& kv_ends,
                        const std::optional<IntArray>&, const std::optional<IntArray>&, double scale, double keep,
                        int64_t, int64_t, int64_t num_heads, const char* layout, int64_t, int64_t sparse_mode, int64_t,
                        int64_t, Reserved, int64_t, int64_t, const OptionalTensor&, const OptionalTensor&,
                        const OptionalTensor&, const Tensor& out) {
  require(is_ascend950(), kInvalidParameter, "aclnnFlashAttentionScoreV4 supports Ascend 950 only");
  const bool is_extended = q_rope || k_rope || q_scale || k_scale || v_scale || sink;
  require(!is_extended, kInvalidParameter, "rotary parts, quantised inputs and sinks are not emulated");
  const bool is_plain = !pse && !drop_mask && !padding_mask && is_absent(prefix) && keep == 1.0;
  check_packed({q, k, v, mask, q_ends, kv_ends, scale, num_heads, out},
               {.layout = layout, .sparse_mode = sparse_mode, .is_plain = is_plain, .most_sequences = 20000});
}

void run_attention950(Tensor q, Tensor k, Tensor v, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor mask,
                      OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                      std::optional<IntArray>, IntArray q_ends, IntArray kv_ends, std::optional<IntArray>,
                      std::optional<IntArray>, double scale, double, int64_t, int64_t, int64_t num_heads, const char*,
                      int64_t, int64_t, int64_t, int64_t, Reserved, int64_t, int64_t, OptionalTensor, OptionalTensor,
                      OptionalTensor, Tensor out) {
  run_packed({q, k, v, mask, q_ends, kv_ends, scale, num_heads, out});
}

}  // namespace
}  // namespace emulated_cann

ACLNN_CHECKED(FlashAttentionVarLenScore, check_attention, run_attention)
ACLNN_CHECKED(FlashAttentionScoreV4, check_attention950, run_attention950)
