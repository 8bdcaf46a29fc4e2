// SPDX-License-Identifier: Apache-2.0
// The CPU kernels on every instruction set that this processor has, against loops in double. Knows neither ATen nor
// gtest, so that it also builds for another architecture and runs under an emulator (tests/arm/run.sh).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/kernels/cpu/causal_conv1d.h"
#include "core/kernels/cpu/chunk_gated_delta_rule.h"
#include "core/kernels/cpu/expert_products.h"
#include "core/kernels/cpu/expert_sums.h"
#include "core/kernels/cpu/gates.h"
#include "core/kernels/cpu/gdn_decode_step.h"
#include "core/kernels/cpu/gdn_gating.h"
#include "core/kernels/cpu/linear.h"
#include "core/kernels/cpu/linear_f32.h"
#include "core/kernels/cpu/linear_rows.h"
#include "core/kernels/cpu/paged_attention.h"
#include "core/kernels/cpu/quantized_linear.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule.h"
#include "core/kernels/cpu/replay_gated_delta_rule.h"
#include "core/kernels/cpu/rms_norm.h"
#include "core/kernels/cpu/rms_norm_gated.h"
#include "core/kernels/cpu/store_kv.h"
#include "core/kernels/ops/logits.h"
#include "hwy/targets.h"

namespace xgdn::kernel::cpu {
namespace {

using Doubles = std::vector<double>;

std::string instruction_set;
int failures = 0;

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Numbers as a kernel sees them: f32 or bf16.
class Numbers {
 public:
  Numbers(DType dtype, size_t count) : dtype_(dtype), bytes_(count * size_of(dtype), 0xFF) {}  // NaN

  static Numbers random(DType dtype, size_t count, float size = 1.0f) {
    static std::mt19937 generator(1);
    Numbers x(dtype, count);
    std::normal_distribution<float> normal(0.0f, size);
    for (size_t i = 0; i < count; ++i) x.set(i, normal(generator));
    return x;
  }

  void set(size_t i, float value) {
    const uint16_t half = to_bfloat16(value);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(bytes_.data() + 4 * i, &value, 4);
    } else {
      std::memcpy(bytes_.data() + 2 * i, &half, 2);
    }
  }
  double operator[](size_t i) const {
    float wide;
    uint16_t half;
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&wide, bytes_.data() + 4 * i, 4);
      return wide;
    }
    std::memcpy(&half, bytes_.data() + 2 * i, 2);
    return from_bfloat16(half);
  }

  void* data() { return bytes_.data(); }
  size_t size() const { return bytes_.size() / size_of(dtype_); }
  bool has_bits_of(const Numbers& other) const { return bytes_ == other.bytes_; }
  InRows in(int64_t token_stride, int64_t head_stride, size_t first = 0) const {
    return {bytes_.data() + first * size_of(dtype_), dtype_, token_stride, head_stride};
  }
  OutRows out(int64_t token_stride, int64_t head_stride) { return {bytes_.data(), dtype_, token_stride, head_stride}; }

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// Memory for packed operands, aligned as tiles want it.
struct alignas(64) PackedLine {
  uint16_t elements[32];
};

double tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 2e-6 : 8e-3;
}

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED on %s: %s\n", instruction_set.c_str(), what.c_str());
}

// `squares`: of what the error is relative to.
void expect_close(const std::string& what, const Numbers& got, const Doubles& want, double bound, double squares) {
  double difference = 0;
  for (size_t i = 0; i < want.size(); ++i) difference += (got[i] - want[i]) * (got[i] - want[i]);
  const double error = std::sqrt(difference / squares);
  expect(error <= bound, what + ": relative error " + std::to_string(error));  // false for NaN
}

void expect_close(const std::string& what, const Numbers& got, const Doubles& want, double bound) {
  double squares = 0;
  for (const double x : want) squares += x * x;
  expect_close(what, got, want, bound, squares);
}

// Sums of what has signs of its own. A sum can be next to nothing: errors are relative to what is added.
struct Sums {
  Doubles values;
  double squares = 0;  // of all that is added

  void begin(double first) { values.push_back(0), add(first); }
  void add(double term) { values.back() += term, squares += term * term; }
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// ---- bf16 products --------------------------------------------------------------------------------------------------

// The products of packed_product.h as plain loops, so that what is built on them is tested where no instructions are.
void multiply_plainly(const Product<uint16_t>& p) {
  for (size_t i = 0; i < p.panels * p.rows * kPanel; ++i) {
    const size_t panel = i / (p.rows * kPanel), row = i / kPanel % p.rows, column = i % kPanel;
    float& c = p.c[panel * p.c_stride + row * kPanel + column];
    float sum = p.accumulate ? c : 0;
    for (size_t t = 0; t < p.num_terms; ++t) {
      const uint16_t* a = p.terms[t].a + row * p.a_stride;
      const uint16_t* b = p.terms[t].b + panel * p.b_stride + 2 * column;
      for (size_t d = 0; d < p.terms[t].depth; ++d) {
        sum += from_bfloat16(a[d]) * from_bfloat16(b[d / 2 * 2 * kPanel + d % 2]);
      }
    }
    c = sum;
  }
}
constexpr BFloat16Products kPlainProducts = {[] {},
                                             [] {},
                                             multiply_plainly,
                                             /*row_step=*/16,
                                             /*are_tiles=*/false,
                                             /*are_faster=*/false};

// ---- the delta rule -------------------------------------------------------------------------------------------------

struct Rule {
  int64_t tokens, K, V;
  DType dtype;
  static constexpr int64_t H = 1, HV = 2, N = 2;  // both sequences are equally long

  Numbers q = Numbers::random(dtype, N*tokens*H*K), k = Numbers::random(dtype, N*tokens*H*K);
  Numbers v = Numbers::random(dtype, N*tokens*HV*V), out{dtype, static_cast<size_t>(N*tokens*HV*V)};
  Numbers g = Numbers::random(DType::kFloat32, N* tokens* HV);
  Numbers beta = Numbers::random(DType::kFloat32, N* tokens* HV);

  RecurrentGatedDeltaRuleArgs args(Numbers& state, DType state_dtype) {
    for (size_t i = 0; i < g.size(); ++i) {
      g.set(i, -std::abs(static_cast<float>(g[i])));
      beta.set(i, std::min(std::abs(static_cast<float>(beta[i])), 1.0f));
    }
    RecurrentGatedDeltaRuleArgs a;
    a.N = N, a.H = H, a.HV = HV, a.K = K, a.V = V;
    a.q = q.in(H * K, K), a.k = k.in(H * K, K), a.v = v.in(HV * V, V);
    a.g = g.in(HV, 1), a.beta = beta.in(HV, 1);
    a.out = out.out(HV * V, V);
    a.state = {.data = state.data(), .dtype = state_dtype, .stride = HV * V * K};
    a.scale = 0.5f;
    a.v_block = V;
    return a;
  }

  // The same in chunks, with f32 products.
  ChunkGatedDeltaRuleArgs chunk_args(Numbers& state, DType state_dtype) {
    ChunkGatedDeltaRuleArgs a = {args(state, state_dtype)};
    a.heads_per_item = HV, a.v_block = V;
    return a;
  }

  // o of all tokens; `state` [N, HV, V, K] becomes the last.
  Doubles in_double(Doubles& state) const {
    Doubles o;
    for (int64_t row = 0; row < N * tokens; ++row) {
      for (int64_t h = 0; h < HV; ++h) {
        double kk = 1e-6, qq = 1e-6;
        for (int64_t i = 0; i < K; ++i) kk += k[row * K + i] * k[row * K + i], qq += q[row * K + i] * q[row * K + i];
        for (int64_t j = 0; j < V; ++j) {
          double* S = state.data() + ((row / tokens * HV + h) * V + j) * K;
          double sk = 0, sq = 0;
          for (int64_t i = 0; i < K; ++i) sk += (S[i] *= std::exp(g[row * HV + h])) * k[row * K + i] / std::sqrt(kk);
          const double u = beta[row * HV + h] * (v[(row * HV + h) * V + j] - sk);
          for (int64_t i = 0; i < K; ++i) {
            S[i] += u * k[row * K + i] / std::sqrt(kk);
            sq += S[i] * q[row * K + i] / std::sqrt(qq);
          }
          o.push_back(0.5 * sq);
        }
      }
    }
    return o;
  }
};

Doubles doubles(const Numbers& x, size_t count) {
  Doubles wide;
  for (size_t i = 0; i < count; ++i) wide.push_back(x[i]);
  return wide;
}

void run(const RecurrentGatedDeltaRuleArgs& args) {
  recurrent_gated_delta_rule(args, 0, num_work_items(args));
}

void run(const ChunkGatedDeltaRuleArgs& args) {
  for (int64_t item = 0; item < num_work_items(args); ++item) chunk_gated_delta_rule(args, item);
}

// `make_args` is Rule::args or Rule::chunk_args.
template <typename Args>
void test_rule(const std::string& kernel, Args (Rule::*make_args)(Numbers&, DType), int64_t tokens, int64_t K,
               int64_t V, DType dtype, DType state_dtype) {
  const std::string name = kernel + ", " + std::to_string(tokens) + " tokens, K=" + std::to_string(K) +
                           (state_dtype == DType::kFloat32 ? ", f32 state" : ", bf16 state");
  Rule rule{tokens, K, V, dtype};
  Numbers state = Numbers::random(state_dtype, Rule::N * Rule::HV * V * K);
  Doubles want_state = doubles(state, state.size());
  const int32_t slots[] = {0, 1};
  const int32_t cu_seqlens[] = {0, static_cast<int32_t>(tokens), static_cast<int32_t>(2 * tokens)};
  Args args = (rule.*make_args)(state, state_dtype);
  args.state.read = args.state.write = slots;
  args.cu_seqlens = cu_seqlens;
  run(args);
  const Doubles want = rule.in_double(want_state);
  expect_close(name + ", out", rule.out, want, tolerance(dtype));
  expect_close(name + ", state", state, want_state, tolerance(state_dtype));
}

// On replay states: all tokens at once, and one by one with the same bits; the states that result, made plain.
void test_replay(int64_t tokens, int64_t K, int64_t V, DType dtype, DType state_dtype) {
  const std::string name = "replay, " + std::to_string(tokens) + " tokens, K=" + std::to_string(K) +
                           (state_dtype == DType::kFloat32 ? ", f32 state" : ", bf16 state");
  constexpr int64_t C = 16, N = Rule::N, H = Rule::H, HV = Rule::HV;
  Rule rule{tokens, K, V, dtype};
  const Numbers first = Numbers::random(state_dtype, N * HV * V * K);
  Doubles want_state = doubles(first, first.size());
  const int32_t slots[] = {0, 1};
  std::vector<Numbers> outs, states;
  for (const bool at_once : {true, false}) {
    Numbers state = first, k(DType::kFloat32, N * H * C * K), u(DType::kFloat32, N * HV * C * V);
    Numbers g(DType::kFloat32, N * HV * C);
    int32_t lengths[] = {0, 0};
    ReplayGatedDeltaRuleArgs args = {rule.args(state, state_dtype)};
    args.state.read = args.state.write = slots;
    args.ring = {.k = static_cast<float*>(k.data()),
                 .u = static_cast<float*>(u.data()),
                 .g = static_cast<float*>(g.data()),
                 .length = lengths,
                 .R = C,
                 .k_stride = H * C * K,
                 .u_stride = HV * C * V,
                 .g_stride = HV * C,
                 .read = slots,
                 .write = slots};
    args.C = C;
    const int64_t step = at_once ? tokens : 1;
    for (int64_t t = 0; t < tokens; t += step) {
      ReplayGatedDeltaRuleArgs some = args;
      const int32_t cu_seqlens[] = {static_cast<int32_t>(t), static_cast<int32_t>(t + step),
                                    static_cast<int32_t>(t + tokens), static_cast<int32_t>(t + tokens + step)};
      for (const int32_t n : {0, 1}) {  // each by itself: their tokens are not neighbours
        some.N = 1;
        some.cu_seqlens = cu_seqlens + 2 * n;
        some.state.read = some.state.write = some.ring.read = some.ring.write = slots + n;
        replay_gated_delta_rule(some, 0, num_work_items(some));
        write_ring_lengths(some);
      }
    }
    expect(lengths[0] == tokens % C && lengths[1] == tokens % C, name + ", length");
    materialize_state(args, lengths, 0, num_work_items(args));
    outs.push_back(rule.out), states.push_back(state);
  }
  expect(outs[0].has_bits_of(outs[1]) && states[0].has_bits_of(states[1]), name + ", bits of a token at a time");
  const Doubles want = rule.in_double(want_state);
  expect_close(name + ", out", outs[0], want, std::max(tolerance(dtype), tolerance(state_dtype)));
  expect_close(name + ", state", states[0], want_state, tolerance(state_dtype));
}

// How alike the keys of a sequence are: a common key, and another one's share of each token's.
struct Keys {
  const char* name;
  float common;
  float own;
  bool alternates;  // in sign
};
constexpr Keys kKeys[] = {{"random", 0, 1, false},        {"same", 1, 0, false},        {"near 1%", 1, 0.01f, false},
                          {"near 3%", 1, 0.03f, false},   {"near 10%", 1, 0.1f, false}, {"near 30%", 1, 0.3f, false},
                          {"alternating", 1, 0.03f, true}};

// bf16 products keep their bounds (docs/gated_delta_rule.md) whatever the keys are. One rounding of S, R or U to bf16
// breaks them for some of these.
void test_fast_chunks(int32_t tokens, const Keys& keys, float g, float beta, const BFloat16Products* products) {
  constexpr int64_t K = 64, V = 32;
  constexpr double kOutBound = 2e-3, kStateBound = 1e-4;
  const std::string name = std::string("fast chunks, keys ") + keys.name + ", g=" + std::to_string(g);
  Rule rule{tokens, K, V, DType::kBFloat16};
  const Numbers common = Numbers::random(DType::kFloat32, K);
  for (size_t i = 0; i < rule.k.size(); ++i) {
    const double x = keys.common * common[i % K] + keys.own * rule.k[i];
    rule.k.set(i, static_cast<float>(keys.alternates && i / K % 2 == 1 ? -x : x));
  }
  for (size_t i = 0; i < rule.g.size(); ++i) rule.g.set(i, g), rule.beta.set(i, beta);
  Numbers state = Numbers::random(DType::kFloat32, Rule::N * Rule::HV * V * K, 0.5f);
  Doubles want_state = doubles(state, state.size());
  const int32_t slots[] = {0, 1}, cu_seqlens[] = {0, tokens, 2 * tokens};
  ChunkGatedDeltaRuleArgs args = rule.chunk_args(state, DType::kFloat32);
  args.state.read = args.state.write = slots;
  args.cu_seqlens = cu_seqlens;
  args.products = products;
  run(args);
  const Doubles want = rule.in_double(want_state);
  expect_close(name + ", out", rule.out, want, kOutBound);
  expect_close(name + ", state", state, want_state, kStateBound);
}

void test_fast_chunks_with(const BFloat16Products* products) {
  if (products == nullptr) return;
  for (const Keys& keys : kKeys) {
    test_fast_chunks(/*tokens=*/130, keys, /*g=*/0, /*beta=*/1, products);
    test_fast_chunks(/*tokens=*/400, keys, /*g=*/-0.01f, /*beta=*/0.9f, products);
    test_fast_chunks(/*tokens=*/65, keys, /*g=*/-0.5f, /*beta=*/0.1f, products);
  }
}

// Verification writes every state and gives the bits of decode, token by token.
void test_verification(int64_t K, int64_t V, DType state_dtype) {
  constexpr int64_t kTokens = 3;
  const size_t slot = Rule::HV * V * K;
  Rule rule{kTokens, K, V, DType::kBFloat16};
  const Numbers initial = Numbers::random(state_dtype, slot);
  Numbers drafted(state_dtype, 2 * kTokens * slot), decoded(state_dtype, 2 * slot);
  for (size_t i = 0; i < slot; ++i) {
    for (const size_t first : {size_t{0}, kTokens * slot}) drafted.set(first + i, static_cast<float>(initial[i]));
    for (const size_t first : {size_t{0}, slot}) decoded.set(first + i, static_cast<float>(initial[i]));
  }
  const int32_t table[] = {0, 1, 2, 3, 4, 5}, accepted[] = {1, 1}, cu_seqlens[] = {0, 3, 6};
  RecurrentGatedDeltaRuleArgs args = rule.args(drafted, state_dtype);
  args.L = kTokens;
  args.state.read = table;
  args.num_accepted = accepted;
  args.cu_seqlens = cu_seqlens;
  run(args);
  const Numbers out = rule.out;

  const std::string name = "verification, K=" + std::to_string(K);
  for (int32_t t = 0; t < kTokens; ++t) {
    for (int32_t n = 0; n < 2; ++n) {
      const int32_t row[] = {n * 3 + t, n * 3 + t + 1};
      RecurrentGatedDeltaRuleArgs one = rule.args(decoded, state_dtype);
      one.N = 1;
      one.state.read = one.state.write = table + n;
      one.cu_seqlens = row;
      run(one);
      bool same = true;
      for (size_t i = 0; i < slot; ++i) same = same && drafted[(n * 3 + t) * slot + i] == decoded[n * slot + i];
      expect(same, name + ": a state differs from decode's");
    }
  }
  expect(rule.out.has_bits_of(out), name + ": out differs from decode's");
}

// ---- the ops around it ----------------------------------------------------------------------------------------------

void test_conv(int64_t W, DType dtype) {
  constexpr int64_t kTokens = 5, kChannels = 37;
  const Numbers x = Numbers::random(dtype, kTokens * kChannels);
  Numbers weight = Numbers::random(dtype, kChannels * W), bias = Numbers::random(dtype, kChannels);
  Numbers pool = Numbers::random(dtype, (W - 1) * kChannels), out(dtype, kTokens * kChannels);
  const Numbers history = pool;
  const int32_t slot[] = {0}, cu_seqlens[] = {0, kTokens};
  CausalConv1dArgs args;
  args.N = 1, args.D = kChannels, args.W = W, args.R = W - 1;
  args.x = x.in(kChannels, 0), args.out = out.out(kChannels, 0);
  args.weight = weight.data(), args.bias = bias.data();
  args.conv_state = {pool.data(), dtype, (W - 1) * kChannels, slot, slot}, args.cu_seqlens = cu_seqlens;
  causal_conv1d(args, 0, num_work_items(args));

  Doubles want, want_pool;
  const auto input = [&](int64_t t, int64_t c) {
    return t < W - 1 ? history[t * kChannels + c] : x[(t - W + 1) * kChannels + c];
  };
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t c = 0; c < kChannels; ++c) {
      double y = bias[c];
      for (int64_t w = 0; w < W; ++w) y += weight[c * W + w] * input(t + w, c);
      want.push_back(y * sigmoid(y));
    }
  }
  for (int64_t r = 0; r < (W - 1) * kChannels; ++r) {
    want_pool.push_back(input(kTokens + r / kChannels, r % kChannels));
  }
  expect_close("conv, W=" + std::to_string(W), out, want, tolerance(dtype));
  expect_close("conv history, W=" + std::to_string(W), pool, want_pool, 0);
}

void test_norm_and_gating(DType dtype) {
  constexpr int64_t kRows = 3, kDim = 20;
  const Numbers x = Numbers::random(dtype, kRows * kDim), z = Numbers::random(dtype, kRows * kDim, 30.0f);
  const Numbers weight = Numbers::random(dtype, kDim);
  Numbers normed(dtype, kRows * kDim), g(DType::kFloat32, kRows * kDim), beta(DType::kFloat32, kRows * kDim);
  RmsNormGatedArgs norm;
  norm.HV = 1, norm.V = kDim, norm.eps = 1e-6f;
  norm.x = x.in(kDim, 0), norm.z = z.in(kDim, 0), norm.weight = weight.in(0, 1), norm.out = normed.out(kDim, 0);
  rms_norm_gated(norm, 0, kRows);
  GdnGatingArgs gating;
  gating.HV = kDim;
  gating.a = z.in(kDim, 1), gating.b = z.in(kDim, 1), gating.A_log = weight.in(0, 1), gating.dt_bias = weight.in(0, 1);
  gating.g = g.out(kDim, 1), gating.beta = beta.out(kDim, 1);
  gdn_gating(gating, 0, kRows);

  Doubles want_normed, want_g, want_beta;
  for (int64_t i = 0; i < kRows * kDim; ++i) {
    double squares = 0;
    for (int64_t j = i / kDim * kDim; j < (i / kDim + 1) * kDim; ++j) squares += x[j] * x[j];
    const double w = weight[i % kDim];
    want_normed.push_back(w * x[i] / std::sqrt(squares / kDim + 1e-6) * z[i] * sigmoid(z[i]));
    want_g.push_back(-std::exp(w) * (z[i] + w > 30 ? z[i] + w : std::log1p(std::exp(z[i] + w))));
    want_beta.push_back(sigmoid(z[i]));
  }
  expect_close("norm", normed, want_normed, tolerance(dtype));
  expect_close("g", g, want_g, 2e-6);
  expect_close("beta", beta, want_beta, 2e-6);
}

// Rings of the slots of a test.
struct Rings {
  int64_t H, HV, K, V, R;
  std::vector<int32_t> lengths;
  Numbers k = Numbers::random(DType::kFloat32, lengths.size() * H * R * K, 0.1f);
  Numbers u = Numbers::random(DType::kFloat32, lengths.size() * HV * R * V);
  Numbers g = Numbers::random(DType::kFloat32, lengths.size() * HV * R);

  RingView view(const int32_t* slots) {
    return {.k = static_cast<float*>(k.data()),
            .u = static_cast<float*>(u.data()),
            .g = static_cast<float*>(g.data()),
            .length = lengths.data(),
            .R = R,
            .k_stride = H * R * K,
            .u_stride = HV * R * V,
            .g_stride = HV * R,
            .read = slots,
            .write = slots};
  }
  bool has_bits_of(const Rings& other) const {
    return lengths == other.lengths && k.has_bits_of(other.k) && u.has_bits_of(other.u) && g.has_bits_of(other.g);
  }
};

// The fused step has the bits of convolution, rule and norm one after the other; on replay states too, where one of the
// rings fills up.
void test_decode_step(int64_t K, int64_t V, DType dtype, DType state_dtype, bool has_replay_states) {
  constexpr int64_t N = 3, H = 2, HV = 6, W = 4, C = 16;
  const std::string name = has_replay_states ? "decode step on replay states" : "decode step";
  const int64_t D = 2 * H * K + HV * V, width = D + HV * V + 2 * HV;
  const Numbers projected = Numbers::random(dtype, N * width);
  Numbers weight = Numbers::random(dtype, D * W, 0.5f), pool = Numbers::random(dtype, N * (W - 1) * D);
  Numbers state = Numbers::random(state_dtype, N * HV * V * K);
  const Numbers heads = Numbers::random(DType::kFloat32, HV), norm_weight = Numbers::random(DType::kFloat32, V);
  Numbers out(dtype, N * HV * V);
  const int32_t slots[] = {2, -1, 0}, cu_seqlens[] = {0, 1, 2, 3};

  DecodeStepArgs a;
  a.conv.N = N, a.conv.D = D, a.conv.W = W, a.conv.R = W - 1;
  a.conv.x = projected.in(width, 0), a.conv.weight = weight.data(), a.conv.is_update = true;
  a.conv.conv_state = {pool.data(), dtype, (W - 1) * D, slots, slots}, a.conv.cu_seqlens = cu_seqlens;
  a.rule.N = N, a.rule.H = H, a.rule.HV = HV, a.rule.K = K, a.rule.V = V;
  a.rule.beta = projected.in(width, 1, D + HV * V), a.rule.g = projected.in(width, 1, D + HV * V + HV);
  a.rule.A_log = a.rule.dt_bias = heads.in(0, 1);
  a.rule.state = {state.data(), state_dtype, HV * V * K, slots, slots}, a.rule.scale = 0.5f;
  a.rule.out = out.out(HV * V, V);
  a.norm.HV = HV, a.norm.V = V, a.norm.eps = 1e-6f;
  a.norm.z = projected.in(width, V, D), a.norm.weight = norm_weight.in(0, 1), a.norm.out = a.rule.out;

  Rings rings = {H, HV, K, V, C, {C - 1, 0, 7}};
  for (size_t i = 0; i < rings.g.size(); ++i) rings.g.set(i, -std::abs(static_cast<float>(rings.g[i])));
  Rings other_rings = rings;
  if (has_replay_states) a.ring = rings.view(slots), a.C = C;

  Numbers other_pool = pool, other_state = state, other_out = out, mixed(dtype, N * D), o(dtype, N * HV * V);
  gdn_decode_step(a, 0, num_work_items(a));
  if (has_replay_states) write_ring_lengths(replay_args(a));

  a.conv.conv_state.data = other_pool.data(), a.conv.out = mixed.out(D, 0);
  a.rule.state.data = other_state.data(), a.rule.out = o.out(HV * V, V);
  a.rule.q = mixed.in(D, K), a.rule.k = mixed.in(D, K, H * K), a.rule.v = mixed.in(D, V, 2 * H * K);
  a.norm.x = o.in(HV * V, V), a.norm.out = other_out.out(HV * V, V);
  causal_conv1d(a.conv, 0, num_work_items(a.conv));
  if (has_replay_states) {
    Numbers g(DType::kFloat32, N * HV), beta(DType::kFloat32, N * HV);
    gdn_gating({.HV = HV,
                .a = a.rule.g,
                .b = a.rule.beta,
                .A_log = a.rule.A_log,
                .dt_bias = a.rule.dt_bias,
                .g = g.out(HV, 1),
                .beta = beta.out(HV, 1)},
               0, N);
    a.ring = other_rings.view(slots);
    ReplayGatedDeltaRuleArgs rule = replay_args(a);
    rule.g = g.in(HV, 1), rule.beta = beta.in(HV, 1);
    replay_gated_delta_rule(rule, 0, num_work_items(rule));
    write_ring_lengths(rule);
    expect(rings.lengths == std::vector<int32_t>({0, 0, 8}), name + ": lengths of the rings");
    expect(rings.has_bits_of(other_rings), name + ": a ring differs from the ops'");
  } else {
    run({a.rule, /*v_block=*/V});
  }
  rms_norm_gated(a.norm, 0, N * HV);
  bool same = true;
  for (int64_t i = 0; i < N * HV * V; ++i) same = same && out[i] == other_out[i];  // 0 may be -0 in the padded row
  expect(same, name + ": out differs from the ops'");
  expect(state.has_bits_of(other_state) && pool.has_bits_of(other_pool), name + ": a pool differs from the ops'");
}

// ---- the ops of a whole model ---------------------------------------------------------------------------------------

void test_rms_norm(int64_t D, DType dtype, bool has_residual) {
  constexpr int64_t kTokens = 3, H = 2;
  const std::string name = "rms_norm, D=" + std::to_string(D) + (has_residual ? " with residual" : "");
  const Numbers x = Numbers::random(dtype, kTokens * H * D), weight = Numbers::random(DType::kFloat32, D, 0.3f);
  Numbers residual = Numbers::random(dtype, x.size(), 3.0f), out(dtype, x.size());
  Numbers summed = x;
  for (size_t i = 0; has_residual && i < x.size(); ++i) summed.set(i, static_cast<float>(x[i] + residual[i]));
  RmsNormArgs args;
  args.H = H, args.D = D, args.eps = 1e-6f;
  args.x = x.in(H * D, D), args.weight = weight.in(0, 1), args.out = out.out(H * D, D);
  if (has_residual) args.residual = residual.in(H * D, D), args.residual_out = residual.out(H * D, D);
  rms_norm(args, 0, kTokens * H);

  Doubles want;
  for (int64_t i = 0; i < kTokens * H * D; ++i) {
    double squares = 0;
    for (int64_t j = i / D * D; j < (i / D + 1) * D; ++j) squares += summed[j] * summed[j];
    want.push_back((1 + weight[i % D]) * summed[i] / std::sqrt(squares / static_cast<double>(D) + 1e-6));
  }
  expect_close(name, out, want, tolerance(dtype));
  if (!has_residual) return;
  expect(residual.has_bits_of(summed), name + ": the residual is not the rounded sum");
  Numbers of_sum(dtype, x.size());
  args.x = summed.in(H * D, D), args.residual = {}, args.out = of_sum.out(H * D, D);
  rms_norm(args, 0, kTokens * H);
  expect(out.has_bits_of(of_sum), name + ": what is normed is not the rounded sum");
}

// What is rotated is the norm as it is stored.
void test_rotation(int64_t D, int64_t P, DType dtype) {
  constexpr int64_t kTokens = 3, H = 2;
  const std::string name = "rms_norm, D=" + std::to_string(D) + ", P=" + std::to_string(P);
  const Numbers x = Numbers::random(dtype, kTokens * H * D), weight = Numbers::random(DType::kFloat32, D, 0.3f);
  const Numbers cos = Numbers::random(dtype, kTokens * P), sin = Numbers::random(dtype, kTokens * P);
  Numbers normed(dtype, x.size()), out(dtype, x.size());
  RmsNormArgs args;
  args.H = H, args.D = D, args.eps = 1e-6f;
  args.x = x.in(H * D, D), args.weight = weight.in(0, 1), args.out = normed.out(H * D, D);
  rms_norm(args, 0, kTokens * H);
  args.P = P, args.cos = cos.in(P, 1), args.sin = sin.in(P, 1), args.out = out.out(H * D, D);
  rms_norm(args, 0, kTokens * H);

  Doubles want;
  for (int64_t i = 0; i < kTokens * H * D; ++i) {
    const int64_t j = i % D, at = i / (H * D) * P + j, half = P / 2;
    const double crossed = j < half ? -normed[i + half] : j < P ? normed[i - half] : 0.0;
    want.push_back(j < P ? normed[i] * cos[at] + crossed * sin[at] : normed[i]);
  }
  expect_close(name, out, want, 3 * tolerance(dtype));  // both products and their sum are rounded
}

void test_sigmoid_and_mul(int64_t D, DType dtype) {
  constexpr int64_t kTokens = 3, H = 2;
  const Numbers gate = Numbers::random(dtype, kTokens * H * D, 5.0f), x = Numbers::random(dtype, kTokens * H * D);
  Numbers out(dtype, x.size());
  sigmoid_and_mul({.H = H, .D = D, .x = x.in(H * D, D), .gate = gate.in(H * D, D), .out = out.out(H * D, D)}, 0,
                  kTokens * H);
  Doubles want;
  for (size_t i = 0; i < x.size(); ++i) want.push_back(x[i] * sigmoid(gate[i]));
  expect_close("sigmoid_and_mul, D=" + std::to_string(D), out, want, tolerance(dtype));
}

void test_silu_and_mul(int64_t I, DType dtype) {
  constexpr int64_t kTokens = 3;
  const Numbers gate = Numbers::random(dtype, kTokens * I, 5.0f), up = Numbers::random(dtype, kTokens * I);
  Numbers out(dtype, kTokens * I);
  silu_and_mul({.I = I, .gate = gate.in(I, 1), .up = up.in(I, 1), .out = out.out(I, 1)}, 0, kTokens);
  Doubles want;
  for (size_t i = 0; i < gate.size(); ++i) want.push_back(gate[i] * sigmoid(gate[i]) * up[i]);
  expect_close("silu_and_mul, I=" + std::to_string(I), out, want, tolerance(dtype));
}

// Rows of int8 as a cache holds them: D codes, then their scale.
struct CodeRows {
  int64_t D;
  std::vector<unsigned char> bytes;  // 0xFF: a scale of NaN

  CodeRows(int64_t dim, int64_t rows) : D(dim), bytes(rows * size(), 0xFF) {}
  int64_t size() const { return D + 4; }
  int8_t code(int64_t row, int64_t i) const { return static_cast<int8_t>(bytes[row * size() + i]); }
  float scale(int64_t row) const {
    float scale;
    std::memcpy(&scale, bytes.data() + row * size() + D, sizeof(scale));
    return scale;
  }
  void set_scale(int64_t row, float scale) { std::memcpy(bytes.data() + row * size() + D, &scale, sizeof(scale)); }
};

// Every second row of the cache is written; the others keep their bits.
void test_store_codes(int64_t D, DType dtype) {
  constexpr int64_t kTokens = 6, HKV = 2;
  const std::string name = "store_kv of int8, D=" + std::to_string(D);
  Numbers k = Numbers::random(dtype, kTokens * HKV * D, 3.0f), v = Numbers::random(dtype, kTokens * HKV * D, 1e-3f);
  k.set(5, INFINITY);                                                    // token 0, head 0
  for (int64_t i = 0; i < D; ++i) k.set(static_cast<size_t>(D + i), 0);  // token 0, head 1
  CodeRows k_cache(D, 2 * kTokens * HKV), v_cache = k_cache;
  const std::vector<int32_t> rows = {2, 0, -1, 10, 4, 8};
  store_kv({.HKV = HKV,
            .D = D,
            .k = k.in(HKV * D, D),
            .v = v.in(HKV * D, D),
            .cache_rows = {.are_int8 = true, .bytes = k_cache.size()},
            .k_cache = k_cache.bytes.data(),
            .v_cache = v_cache.bytes.data(),
            .rows = rows.data()},
           0, kTokens);
  for (const auto& [tokens, cache] : {std::pair(&k, &k_cache), std::pair(&v, &v_cache)}) {
    for (int64_t row = 0; row < 2 * kTokens; ++row) {
      const auto token = std::find(rows.begin(), rows.end(), row) - rows.begin();
      for (int64_t head = 0; head < HKV; ++head) {
        const int64_t at = row * HKV + head;
        const bool is_special = tokens == &k && token == 0 && head == 0;
        if (token == kTokens) {
          const auto* begin = cache->bytes.data() + at * cache->size();
          expect(std::all_of(begin, begin + cache->size(), [](unsigned char byte) { return byte == 0xFF; }),
                 name + ": a row that is not named is written");
        } else if (is_special) {
          expect(std::isnan(cache->scale(at)), name + ": a row with an infinity is not NaN");
        } else {
          double largest = 0;
          for (int64_t i = 0; i < D; ++i)
            largest = std::max(largest, std::abs((*tokens)[(token * HKV + head) * D + i]));
          expect(std::abs(cache->scale(at) - largest / 127) <= 1e-7 * largest / 127, name + ": another scale");
          for (int64_t i = 0; i < D; ++i) {
            const double got = static_cast<double>(cache->scale(at)) * cache->code(at, i);
            expect(std::abs(got - (*tokens)[(token * HKV + head) * D + i]) <= 0.50001 * cache->scale(at),
                   name + ": a code is further away than half a unit");
          }
        }
      }
    }
  }
}

// Sequences of (tokens of this call, context with them); the cache is NaN outside their contexts. Scores of up to about
// 3 times q_size. Blocks of many tokens have the bits of tokens one by one.
struct Attention {
  static constexpr int64_t HKV = 2;
  const std::vector<std::pair<int64_t, int64_t>> sequences = {{1, 1},   {1, 15},  {2, 16},   {3, 17}, {1, 64},
                                                              {1, 130}, {20, 20}, {33, 100}, {4, 0},  {70, 129}};
  int64_t group, D, block_size;
  DType dtype;
  const BFloat16Products* products;
  bool is_int8 = false;
  std::vector<int32_t> blocks = {};        // from the last to the first
  std::vector<int64_t> first_blocks = {};  // of the sequences
  Numbers q{dtype, 0}, k{dtype, 0}, v{dtype, 0};
  CodeRows k_codes{D, 0}, v_codes{D, 0};  // where is_int8: what k and v are made of

  int64_t HQ() const { return HKV * group; }
  size_t row(size_t n, int64_t i) const {
    return (blocks[first_blocks[n] + i / block_size] * block_size + i % block_size) * HKV * D;
  }

  void make(float q_size) {
    int64_t T = 0, num_blocks = 0;
    for (const auto& [tokens, context] : sequences) {
      first_blocks.push_back(num_blocks);
      T += tokens, num_blocks += (context + block_size - 1) / block_size;
    }
    for (int64_t i = 0; i < num_blocks; ++i) blocks.push_back(static_cast<int32_t>(num_blocks - 1 - i));
    q = Numbers::random(dtype, T * HQ() * D, q_size);
    k = v = Numbers(is_int8 ? DType::kFloat32 : dtype, num_blocks * block_size * HKV * D);
    if (is_int8) k_codes = v_codes = CodeRows(D, num_blocks * block_size * HKV);
    for (size_t n = 0; n < sequences.size(); ++n) {
      for (int64_t i = 0; i < sequences[n].second; ++i) {
        if (is_int8) {
          for (int64_t head = 0; head < HKV; ++head) {
            make_codes(row(n, i) / D + head, k_codes, k);
            make_codes(row(n, i) / D + head, v_codes, v);
          }
          continue;
        }
        for (Numbers* pool : {&k, &v}) {
          const Numbers values = Numbers::random(dtype, HKV * D);
          for (int64_t j = 0; j < HKV * D; ++j) pool->set(row(n, i) + j, static_cast<float>(values[j]));
        }
      }
    }
  }

  // A row that f32 holds exactly, of numbers that are about normal.
  static void make_codes(int64_t row, CodeRows& codes, Numbers& numbers) {
    const Numbers normal = Numbers::random(DType::kFloat32, codes.D + 1);
    const float scale = from_bfloat16(to_bfloat16(static_cast<float>(0.01 + 0.02 * std::abs(normal[codes.D]))));
    codes.set_scale(row, scale);
    for (int64_t i = 0; i < codes.D; ++i) {
      const double code = std::clamp(std::nearbyint(normal[i] / 0.02), -127.0, 127.0);
      codes.bytes[row * codes.size() + i] = static_cast<unsigned char>(static_cast<int8_t>(code));
      numbers.set(row * codes.D + i, static_cast<float>(code) * scale);
    }
  }

  Doubles expected() const {
    Doubles want;
    int64_t t = 0;
    for (size_t n = 0; n < sequences.size(); ++n) {
      const auto [tokens, context] = sequences[n];
      for (int64_t token = 0; token < tokens; ++token, ++t) {
        for (int64_t h = 0; h < HQ(); ++h) {
          const int64_t seen = std::max<int64_t>(context - tokens + 1 + token, 0);
          Doubles scores(seen, 0.0), sum(D, 0.0);
          for (int64_t i = 0; i < seen; ++i) {
            for (int64_t j = 0; j < D; ++j) scores[i] += q[(t * HQ() + h) * D + j] * k[row(n, i) + h / group * D + j];
            scores[i] /= std::sqrt(static_cast<double>(D));
          }
          const double largest = seen == 0 ? 0 : *std::max_element(scores.begin(), scores.end());
          double total = 0;
          for (int64_t i = 0; i < seen; ++i) {
            const double weight = std::exp(scores[i] - largest);
            for (int64_t j = 0; j < D; ++j) sum[j] += weight * v[row(n, i) + h / group * D + j];
            total += weight;
          }
          for (const double x : sum) want.push_back(seen == 0 ? 0 : x / total);
        }
      }
    }
    return want;
  }

  Numbers run(int64_t tokens_at_once) {
    Numbers out(dtype, q.size());
    PagedAttentionArgs args;
    args.HQ = HQ(), args.HKV = HKV, args.D = D, args.B = block_size;
    args.q = q.in(HQ() * D, D), args.k = k.data(), args.v = v.data(), args.out = out.out(HQ() * D, D);
    args.cache_rows = {.are_int8 = false, .bytes = D * size_of(dtype)};
    if (is_int8) {
      args.k = k_codes.bytes.data(), args.v = v_codes.bytes.data();
      args.cache_rows = {.are_int8 = true, .bytes = k_codes.size()};
    }
    args.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(D))), args.products = products;
    int64_t t = 0;
    for (size_t n = 0; n < sequences.size(); ++n) {
      const auto [tokens, context] = sequences[n];
      for (int64_t begin = 0; begin < tokens; begin += tokens_at_once) {
        const AttentionBlock block = {.token = t + begin,
                                      .num_tokens = std::min(tokens_at_once, tokens - begin),
                                      .context_len = context - tokens + 1 + begin,
                                      .blocks = blocks.data() + first_blocks[n]};
        for (int64_t head = 0; head < HKV; ++head) paged_attention(args, block, head);
      }
      t += tokens;
    }
    return out;
  }
};

void test_attention(int64_t group, int64_t D, int64_t block_size, DType dtype, float q_size,
                    const BFloat16Products* products = nullptr, bool is_int8 = false) {
  Attention call = {
      .group = group, .D = D, .block_size = block_size, .dtype = dtype, .products = products, .is_int8 = is_int8};
  call.make(q_size);
  const std::string name = "attention, D=" + std::to_string(D) + ", " + std::to_string(group) + " heads a key head" +
                           (is_int8 ? ", int8" : "");
  const Numbers out = call.run(/*tokens_at_once=*/70);
  // An error of a score is the relative one of its weight.
  expect_close(name, out, call.expected(), tolerance(dtype) * (dtype == DType::kFloat32 ? q_size : 1.0f));
  for (const int64_t tokens_at_once : {1, 7, 32}) {
    expect(out.has_bits_of(call.run(tokens_at_once)), name + ": a token's bits depend on the tokens beside it");
  }

  // An infinite value, or a row of codes that is NaN, which those before it do not see.
  const size_t last = call.sequences.size() - 1, special = call.row(last, 80);
  if (is_int8) {
    call.v_codes.set_scale(static_cast<int64_t>(special) / D, NAN);
  } else {
    call.v.set(special + 1, INFINITY);
  }
  const Numbers spoilt = call.run(/*tokens_at_once=*/70);
  const int64_t first_to_see = static_cast<int64_t>(out.size()) / (call.HQ() * D) - (129 - 80);
  for (size_t i = 0; i < out.size(); ++i) {
    const auto token = static_cast<int64_t>(i) / (call.HQ() * D), head = static_cast<int64_t>(i) / D % call.HQ();
    const bool sees = token >= first_to_see && head < group && (is_int8 || static_cast<int64_t>(i) % D == 1);
    expect(sees ? !std::isfinite(spoilt[i]) : spoilt[i] == out[i],
           name + ": an infinite value is not where it belongs");
  }
}

// A product; its two kernels take the same.
using LinearKernel = std::function<void(const LinearCall&)>;

LinearKernel packed_linear(const BFloat16Products* products) {
  return [products](const LinearCall& call) {
    LinearArgs args = {call, products};
    const size_t lines = (packed_size(args) * sizeof(uint16_t) + sizeof(PackedLine) - 1) / sizeof(PackedLine);
    std::vector<PackedLine> packed(lines);
    args.packed = packed.data()->elements;
    pack_tokens(args, 0, num_panels(args));
    if (args.T <= kFewTokens) {
      for (int64_t item = 0; item < num_few_items(args); ++item) linear_of_few(args, item, item + 1);
      return;
    }
    const int64_t part_tokens = 8 * kPanelPair;
    for (int64_t token = 0; token < args.T; token += part_tokens) {
      const LinearArgs part = of_tokens(args, token, std::min(part_tokens, args.T - token));
      linear(part, 0, num_work_items(part));
    }
  };
}

// Half of the tokens item by item, the others all items at once.
void linear_by_rows(const LinearRowsArgs& args) {
  const int64_t half = args.T / 2, items = num_work_items(args);
  const LinearRowsArgs first = of_tokens(args, 0, half);
  for (int64_t item = 0; item < items; ++item) linear_rows(first, item, item + 1, item + 1);
  linear_rows(of_tokens(args, half, args.T - half), 0, items, items);
}

void linear_by_widened_rows(const LinearCall& call) {
  std::vector<float> widened(static_cast<size_t>(call.T * widened_stride(call.D)), NAN);
  const LinearRowsArgs args = {call, widened.data()};
  widen_tokens(args, 0, call.T);
  linear_by_rows(args);
}

void linear_by_paired_rows(const LinearCall& call) {
  linear_by_rows({call});
}

// Runs a product of rows that lie apart, `width` in out, for all tokens at once, and for each by itself: the bits are
// the same.
template <class Call, class Run>
Numbers run_product(const std::string& name, Call args, DType out_dtype, int64_t width, const Run& run) {
  Numbers out(out_dtype, args.T * width), one_by_one(out_dtype, args.T * width);
  args.out = out.out(width, 1);
  run(args);
  for (int64_t t = 0; t < args.T; ++t) {
    Call one = args;
    one.T = 1;
    one.x.data = args.x.at(t, 0);
    one.out = one_by_one.out(width, 1);
    one.out.data = one.out.at(t, 0);
    run(one);
  }
  expect(out.has_bits_of(one_by_one), name + ": a token's bits depend on the tokens beside it");
  return out;
}

// All tokens at once, and each by itself with the same bits. Rows of x, weight and out lie apart.
void test_linear(int64_t T, int64_t D, int64_t O, DType out_dtype, bool has_bias, const LinearKernel& kernel,
                 int64_t gap = 2) {
  const int64_t width = O + gap;
  const std::string name = "linear, T=" + std::to_string(T) + ", O=" + std::to_string(O);
  const Numbers x = Numbers::random(DType::kBFloat16, T * (D + gap));
  Numbers weight = Numbers::random(DType::kBFloat16, O * (D + gap));
  const Numbers bias = Numbers::random(DType::kBFloat16, O, 10.0f);
  LinearCall args;
  args.T = T, args.D = D, args.O = O;
  args.x = x.in(D + gap, 0);
  args.weight = static_cast<const uint16_t*>(weight.data()), args.weight_stride = D + gap;
  if (has_bias) args.bias = bias.in(0, 1);
  const Numbers out = run_product(name, args, out_dtype, width, kernel);

  Numbers inside(out_dtype, T * O);
  Sums want;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t o = 0; o < O; ++o) {
      want.begin(has_bias ? bias[o] : 0);
      for (int64_t i = 0; i < D; ++i) want.add(x[t * (D + gap) + i] * weight[o * (D + gap) + i]);
      inside.set(t * O + o, static_cast<float>(out[t * width + o]));
    }
    for (int64_t o = O; o < width; ++o) expect(std::isnan(out[t * width + o]), name + ": writes beside out");
  }
  expect_close(name, inside, want.values, tolerance(out_dtype), want.squares);
}

void test_linear_with(const LinearKernel& kernel) {
  for (const DType out_dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t T : {1, 2, 3, 5, 6, 7, 16, 17, 34, 47}) {
      for (const int64_t O : {16, 80}) test_linear(T, /*D=*/96, O, out_dtype, /*has_bias=*/T % 2 == 1, kernel);
    }
  }
  for (const int64_t gap : {0, 2}) {
    test_linear(/*T=*/257, /*D=*/544, /*O=*/144, DType::kBFloat16, /*has_bias=*/true, kernel, gap);
  }
  test_linear(/*T=*/13, /*D=*/4256, /*O=*/48, DType::kFloat32, /*has_bias=*/false, kernel);  // several pieces of D
}

// All tokens at once, and each by itself with the same bits. Rows of x, weight and out lie apart.
void test_linear_f32(int64_t T, int64_t D, int64_t O, bool has_bias) {
  constexpr int64_t kGap = 3;
  const std::string name = "linear of f32, T=" + std::to_string(T) + ", O=" + std::to_string(O);
  Numbers x = Numbers::random(DType::kFloat32, T * (D + kGap));
  Numbers weight = Numbers::random(DType::kFloat32, O * (D + kGap));
  Numbers bias = Numbers::random(DType::kFloat32, O, 10.0f);
  Numbers out(DType::kFloat32, T * (O + kGap)), one_by_one(DType::kFloat32, T * (O + kGap));
  const auto multiply = [&](int64_t token, int64_t count, Numbers& to) {
    LinearF32Args args = {.T = count, .D = D, .O = O, .x_stride = D + kGap, .weight_stride = D + kGap};
    args.x = static_cast<const float*>(x.data()) + token * (D + kGap);
    args.weight = static_cast<const float*>(weight.data());
    args.bias = has_bias ? static_cast<const float*>(bias.data()) : nullptr;
    args.out = static_cast<float*>(to.data()) + token * (O + kGap);
    args.out_stride = O + kGap;
    const int64_t items = num_work_items(args);
    for (int64_t item = 0; item < items; ++item) linear_f32(args, item, item + 1);
  };
  multiply(0, T, out);
  for (int64_t t = 0; t < T; ++t) multiply(t, 1, one_by_one);
  expect(out.has_bits_of(one_by_one), name + ": a token's bits depend on the tokens beside it");
  Numbers inside(DType::kFloat32, T * O);
  Sums want;
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t o = 0; o < O; ++o) {
      want.begin(has_bias ? bias[o] : 0);
      for (int64_t i = 0; i < D; ++i) want.add(x[t * (D + kGap) + i] * weight[o * (D + kGap) + i]);
      inside.set(t * O + o, static_cast<float>(out[t * (O + kGap) + o]));
    }
    for (int64_t o = O; o < O + kGap; ++o) expect(std::isnan(out[t * (O + kGap) + o]), name + ": writes beside out");
  }
  expect_close(name, inside, want.values, tolerance(DType::kFloat32), want.squares);
}

// Any number of outputs, weights without gaps, and few tokens of a D that a cache does not hold.
void test_linear_by_rows(const LinearKernel& kernel) {
  test_linear_with(kernel);
  for (const int64_t T : {1, 2, 5, 9}) {
    for (const int64_t O : {41, 200})
      test_linear(T, /*D=*/96, O, DType::kFloat32, /*has_bias=*/true, kernel, /*gap=*/0);
  }
  for (const int64_t T : {1, 4}) {  // one at once, and two
    for (const int64_t D : {4128, 8224}) test_linear(T, D, /*O=*/35, DType::kFloat32, /*has_bias=*/false, kernel);
  }
}

// A weight [O, D] in 8 or 4 bits as kernels read it, and its values.
struct QuantizedWeight {
  std::vector<uint8_t> codes;
  Numbers scales;
  std::vector<int8_t> zeros;
  std::vector<int32_t> order;
  Doubles values;
};

double value_of_float8(int code) {
  const double size = code >> 3 & 15 ? std::ldexp(8 + (code & 7), (code >> 3 & 15) - 10) : std::ldexp(code & 7, -9);
  return code & 0x80 ? -size : size;
}

QuantizedWeight quantized_weight(Codes format, int64_t D, int64_t O, int64_t group_size, DType scale_dtype,
                                 bool has_zeros) {
  constexpr int64_t kPanel = 16;
  const bool is_int4 = format == Codes::kInt4;
  const int64_t groups = D / group_size, panels = (O + kPanel - 1) / kPanel;
  const int64_t depth = is_int4 ? 8 : format == Codes::kInt8 ? 4 : 2;
  const int64_t row_bytes = is_int4 ? 4 : depth;  // of an output
  std::mt19937 generator(2);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); };
  QuantizedWeight weight = {std::vector<uint8_t>(static_cast<size_t>(panels * kPanel * D / depth * row_bytes)),
                            Numbers(scale_dtype, static_cast<size_t>(panels * groups * kPanel)),
                            std::vector<int8_t>(static_cast<size_t>(has_zeros ? panels * groups * kPanel : 0)),
                            std::vector<int32_t>(static_cast<size_t>(D)), Doubles(static_cast<size_t>(O * D))};
  for (int64_t i = 0; i < panels * groups * kPanel; ++i) weight.scales.set(i, 0);
  std::iota(weight.order.begin(), weight.order.end(), 0);
  std::shuffle(weight.order.begin(), weight.order.end(), generator);
  for (int64_t o = 0; o < O; ++o) {
    const auto at = [&](int64_t row, int64_t rows) { return (o / kPanel * rows + row) * kPanel + o % kPanel; };
    for (int64_t d = 0; d < D; ++d) {
      const int64_t group = at(d / group_size, groups);
      if (d % group_size == 0) {
        weight.scales.set(group, static_cast<float>(draw(1, 50)) / 16.0f);
        if (has_zeros) weight.zeros[group] = static_cast<int8_t>(is_int4 ? draw(0, 15) : draw(-128, 127));
      }
      uint8_t* bytes = weight.codes.data() + at(d / depth, D / depth) * row_bytes;
      const int64_t element = d % depth;
      const int zero = has_zeros ? weight.zeros[group] : is_int4 ? 8 : 0;
      double value;
      if (is_int4) {  // 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on
        const int code = draw(0, 15);
        const int64_t nibble = element % 2 * 4 + element / 2;
        bytes[nibble / 2] = static_cast<uint8_t>(bytes[nibble / 2] | code << nibble % 2 * 4);
        value = code - zero;
      } else if (format == Codes::kInt8) {  // 0, 2, 1, 3
        const int code = draw(-128, 127);
        bytes[element % 2 * 2 + element / 2] = static_cast<uint8_t>(code);
        value = code - zero;
      } else {
        const int code = draw(0, 126) | draw(0, 1) << 7;
        bytes[element] = static_cast<uint8_t>(code);
        value = value_of_float8(code);
      }
      weight.values[o * D + weight.order[d]] = weight.scales[group] * value;
    }
  }
  return weight;
}

// What a token is beside integer codes: multiples of a scale for each group of columns in their order.
Doubles rounded_token(Doubles x, const std::vector<int32_t>& order, int64_t group_size, int64_t bits) {
  const float most = bits == 8 ? 127.0f : 32639.0f;
  for (int64_t first = 0; first < static_cast<int64_t>(x.size()); first += group_size) {
    float largest = 0;
    for (int64_t i = first; i < first + group_size; ++i) {
      largest = std::max(largest, std::abs(static_cast<float>(x[order[i]])));
    }
    const float scale = largest / most, inverse = largest == 0 ? 0 : most / largest;
    for (int64_t i = first; i < first + group_size; ++i) {
      x[order[i]] = static_cast<double>(std::nearbyint(static_cast<float>(x[order[i]]) * inverse)) * scale;
    }
  }
  return x;
}

void run_quantized_linear(QuantizedLinearArgs args) {
  const auto lines = [](int64_t bytes) { return std::vector<PackedLine>(static_cast<size_t>(bytes) / 64 + 1); };
  std::vector<PackedLine> tokens = lines(args.T * token_stride(args)), scales = lines(args.T * num_groups(args) * 4),
                          sums = scales;
  args.by_tiles = takes_tiles(args.format, args.T);
  args.tokens = tokens.data();
  args.token_scales = reinterpret_cast<float*>(scales.data());
  args.token_starts = reinterpret_cast<int32_t*>(sums.data());
  prepare_tokens(args, 0, args.T);
  quantized_linear(args, 0, num_work_items(args), num_work_items(args));
}

// All tokens at once, and each by itself with the same bits. Rows of x and out lie apart.
void test_quantized_linear(Codes format, int64_t bits, int64_t T, int64_t D, int64_t O, int64_t group_size,
                           DType out_dtype, bool has_options) {
  constexpr int64_t kGap = 3;
  const int64_t width = O + kGap;
  const std::string name = "quantized linear, format " + std::to_string(static_cast<int>(format)) + ", " +
                           std::to_string(bits) + " bits, T=" + std::to_string(T) + ", D=" + std::to_string(D) +
                           ", O=" + std::to_string(O);
  const DType in_dtype = has_options ? DType::kBFloat16 : DType::kFloat32;
  const Numbers x = Numbers::random(in_dtype, T * (D + kGap)), bias = Numbers::random(in_dtype, O, 100.0f);
  const bool has_zeros = has_options && format != Codes::kFloat8;
  QuantizedWeight weight = quantized_weight(format, D, O, group_size, in_dtype, has_zeros);
  std::vector<int32_t> columns = weight.order;
  if (!has_options) {  // the columns as they are
    std::iota(columns.begin(), columns.end(), 0);
    const Doubles ordered = weight.values;
    for (int64_t o = 0; o < O; ++o) {
      for (int64_t d = 0; d < D; ++d) weight.values[o * D + d] = ordered[o * D + weight.order[d]];
    }
  }
  QuantizedLinearArgs args;
  args.T = T, args.D = D, args.O = O, args.group_size = group_size, args.format = format;
  args.activation_bits = bits;
  args.x = x.in(D + kGap, 0), args.codes = weight.codes.data();
  args.scales = weight.scales.in(16 * num_groups(args), 16);
  if (has_zeros) args.zeros = weight.zeros.data();
  if (has_options) args.order = weight.order.data(), args.bias = bias.in(0, 1);
  const Numbers out = run_product(name, args, out_dtype, width, run_quantized_linear);

  Numbers inside(out_dtype, T * O);
  Sums want;
  for (int64_t t = 0; t < T; ++t) {
    Doubles token(static_cast<size_t>(D));
    for (int64_t d = 0; d < D; ++d) token[d] = x[t * (D + kGap) + d];
    if (format != Codes::kFloat8) token = rounded_token(token, columns, group_size, bits);
    for (int64_t o = 0; o < O; ++o) {
      want.begin(has_options ? bias[o] : 0);
      for (int64_t d = 0; d < D; ++d) want.add(token[d] * weight.values[o * D + d]);
      inside.set(t * O + o, static_cast<float>(out[t * width + o]));
    }
    for (int64_t o = O; o < width; ++o) expect(std::isnan(out[t * width + o]), name + ": writes beside out");
  }
  expect_close(name, inside, want.values, tolerance(out_dtype), want.squares);
}

void test_quantized_linears(Codes format, int64_t bits) {
  for (const int64_t T : {1, 2, 3, 4, 5, 6, 7, 12, 13, 97}) {
    for (const int64_t O : {16, 40, 80}) {
      for (const bool has_options : {false, true}) {
        test_quantized_linear(format, bits, T, /*D=*/96, O, /*group_size=*/32, DType::kFloat32, has_options);
      }
    }
    test_quantized_linear(format, bits, T, /*D=*/64, /*O=*/33, /*group_size=*/64, DType::kBFloat16, T % 2 == 1);
    test_quantized_linear(format, bits, T, /*D=*/256, /*O=*/47, /*group_size=*/128, DType::kFloat32, T % 2 == 0);
  }
  // More than is unpacked at once, and not a multiple of it.
  test_quantized_linear(format, bits, /*T=*/13, /*D=*/1184, /*O=*/40, /*group_size=*/32, DType::kFloat32, true);
  test_quantized_linear(format, bits, /*T=*/13, /*D=*/1152, /*O=*/33, /*group_size=*/128, DType::kFloat32, true);
}

// A mixture of experts. Everybody chooses the last one, nobody the first, some one twice.
struct Mixture {
  static constexpr int64_t E = 6, A = 3, D = 96, I = 64;
  int64_t T;
  DType dtype;

  Numbers x = Numbers::random(dtype, T*(D + 1)), weights = Numbers::random(dtype, T*A);  // rows of x lie apart
  std::vector<int64_t> chosen = choices();

  std::vector<int64_t> choices() const {
    std::vector<int64_t> all;
    for (int64_t t = 0; t < T; ++t) {
      for (const int64_t e : {1 + t % 3, t % 4 == 1 ? 1 + t % 3 : int64_t{4}, int64_t{5}}) all.push_back(e);
    }
    return all;
  }

  // The rows of `count` tokens from `first` on, in ranges of items that end inside experts.
  Numbers run(ExpertProduct& gate_up, ExpertProduct& down, int64_t first, int64_t count) const {
    constexpr int64_t kItems = 3;
    const ExpertVisits visits = sort_by_expert(chosen.data() + first * A, count, A, E);
    Numbers gated(dtype, count * A * 2 * I), outputs(DType::kFloat32, count * A * D), out(dtype, count * D);
    const auto arrange = [&](ExpertProduct& product, const InRows& rows, const int64_t* row_of_visit) {
      const auto bytes = static_cast<size_t>(product.num_bytes(visits));
      std::vector<PackedLine> memory((bytes + sizeof(PackedLine) - 1) / sizeof(PackedLine));
      std::memset(memory.data(), 0xFF, memory.size() * sizeof(PackedLine));
      product.set_memory(memory.data(), visits);
      for (size_t panel = 0; panel < visits.panels.size(); ++panel) {
        product.arrange(rows, row_of_visit, static_cast<int64_t>(panel));
      }
      return memory;
    };
    const auto in_ranges = [](int64_t items, const auto& f) {
      for (int64_t item = 0; item < items; item += kItems) f(item, std::min(item + kItems, items));
    };
    const auto of_x = arrange(gate_up, x.in(D + 1, 0, first * (D + 1)), visits.tokens.data());
    in_ranges(num_work_items(visits, I), [&](int64_t begin, int64_t end) {
      gated_experts({.I = I, .visits = &visits, .gate_up = &gate_up, .out = gated.out(2 * I, 1)}, begin, end);
    });
    const auto of_gated = arrange(down, gated.in(2 * I, 0), nullptr);
    in_ranges(num_work_items(visits, D), [&](int64_t begin, int64_t end) {
      expert_outputs({.D = D, .visits = &visits, .down = &down, .out = outputs.out(D, 1)}, begin, end);
    });
    ExpertSumsArgs sums;
    sums.A = A, sums.D = D, sums.visits = visits.visits.data();
    sums.outputs = outputs.in(D, 0), sums.weights = weights.in(A, 1, first * A), sums.out = out.out(D, 0);
    in_ranges(count, [&](int64_t begin, int64_t end) { expert_sums(sums, begin, end); });
    return out;
  }

  // With weights [E, 2I, D] and [E, D, I].
  Doubles in_double(const Doubles& gate_up, const Doubles& down) const {
    Doubles out(static_cast<size_t>(T * D));
    for (int64_t i = 0; i < T * A; ++i) {
      const double* rows = gate_up.data() + chosen[i] * 2 * I * D;
      double gated[I];
      for (int64_t j = 0; j < I; ++j) {
        double gate = 0, up = 0;
        for (int64_t d = 0; d < D; ++d) {
          gate += rows[j * D + d] * x[i / A * (D + 1) + d], up += rows[(I + j) * D + d] * x[i / A * (D + 1) + d];
        }
        gated[j] = gate * sigmoid(gate) * up;
      }
      for (int64_t d = 0; d < D; ++d) {
        const double* row = down.data() + (chosen[i] * D + d) * I;
        for (int64_t j = 0; j < I; ++j) out[i / A * D + d] += weights[i] * row[j] * gated[j];
      }
    }
    return out;
  }

  // All tokens at once, and each by itself with the same bits.
  void test(const std::string& kernel, ExpertProduct& gate_up, ExpertProduct& down, const Doubles& gate_up_values,
            const Doubles& down_values, double bound) const {
    const std::string name = kernel + ", T=" + std::to_string(T);
    const Numbers out = run(gate_up, down, 0, T);
    expect_close(name, out, in_double(gate_up_values, down_values), bound);
    for (int64_t t = 0; t < T; ++t) {
      const Numbers alone = run(gate_up, down, t, 1);
      bool is_equal = true;
      for (int64_t d = 0; d < D; ++d) is_equal = is_equal && alone[d] == out[t * D + d];
      expect(is_equal, name + ": a token's bits depend on the tokens beside it");
    }
  }
};

void test_experts(int64_t T, const BFloat16Products* products, bool is_paired) {
  const Mixture mixture{T, DType::kBFloat16};
  Numbers gate_up = Numbers::random(DType::kBFloat16, Mixture::E * 2 * Mixture::I * Mixture::D, 0.1f);
  Numbers down = Numbers::random(DType::kBFloat16, Mixture::E * Mixture::D * Mixture::I, 0.1f);
  for (int64_t i = 0; i < 2 * Mixture::I * Mixture::D; ++i) gate_up.set(i, NAN);
  LinearCall first, second;
  first.D = Mixture::D, first.O = 2 * Mixture::I;
  first.weight = static_cast<const uint16_t*>(gate_up.data()), first.weight_stride = first.D;
  second.D = Mixture::I, second.O = Mixture::D;
  second.weight = static_cast<const uint16_t*>(down.data()), second.weight_stride = second.D;
  const auto test = [&](const std::string& kernel, auto&& a, auto&& b) {
    mixture.test(kernel, a, b, doubles(gate_up, gate_up.size()), doubles(down, down.size()),
                 tolerance(DType::kBFloat16));
  };
  if (products != nullptr) {
    test("experts of tiles", ExpertTiles(LinearArgs{first, products}), ExpertTiles(LinearArgs{second, products}));
  } else {
    test("experts of rows", ExpertRows(LinearRowsArgs{first}, !is_paired),
         ExpertRows(LinearRowsArgs{second}, !is_paired));
  }
}

void test_quantized_experts(int64_t T, Codes first_format, Codes second_format, DType dtype, bool has_zeros) {
  const Mixture mixture{T, dtype};
  const auto zeros_of = [&](Codes format) { return has_zeros && format != Codes::kFloat8; };
  // All experts, one below the other.
  QuantizedWeight gate_up = quantized_weight(first_format, Mixture::D, Mixture::E * 2 * Mixture::I, /*group_size=*/32,
                                             dtype, zeros_of(first_format));
  QuantizedWeight down = quantized_weight(second_format, Mixture::I, Mixture::E * Mixture::D, /*group_size=*/64, dtype,
                                          zeros_of(second_format));
  const auto args_of = [](QuantizedWeight& weight, Codes format, int64_t D, int64_t O, int64_t group_size) {
    const Doubles ordered = weight.values;
    for (int64_t o = 0; o < Mixture::E * O; ++o) {  // the columns as they are
      for (int64_t d = 0; d < D; ++d) weight.values[o * D + d] = ordered[o * D + weight.order[d]];
    }
    QuantizedLinearArgs args;
    args.D = D, args.O = O, args.group_size = group_size, args.format = format;
    args.codes = weight.codes.data(), args.scales = weight.scales.in(16 * num_groups(args), 16);
    if (!weight.zeros.empty()) args.zeros = weight.zeros.data();
    return args;
  };
  QuantizedExperts first(args_of(gate_up, first_format, Mixture::D, 2 * Mixture::I, 32));
  QuantizedExperts second(args_of(down, second_format, Mixture::I, Mixture::D, 64));
  const std::string formats =
      std::to_string(static_cast<int>(first_format)) + " and " + std::to_string(static_cast<int>(second_format));
  mixture.test("experts of formats " + formats, first, second, gate_up.values, down.values,
               std::max(tolerance(dtype), 2e-4));
}

// ---- logits ---------------------------------------------------------------------------------------------------------

void expect_weights(std::span<const float> logits, const LogitWeights& by, const std::string& what) {
  std::vector<double> want;
  for (const float x : logits) {
    const double exponent = (static_cast<double>(x) - static_cast<double>(by.largest)) * by.rate;
    want.push_back(x >= by.least ? std::exp(exponent) : 0.0);
  }
  const double sum = std::accumulate(want.begin(), want.end(), 0.0);
  std::vector<float> weights(logits.size() + 1, -7.0f);
  weigh_logits(logits, by, std::span(weights).first(logits.size()));
  bool is_close = true;
  for (size_t i = 0; i < want.size(); ++i) {
    // Rounding of an exponent z changes exp(z) by a share of |z| 2^-23; what is smaller than 1e-37 is lost.
    const double exponent = want[i] > 0 ? std::log(want[i]) : 0;
    const double bound = want[i] * (4e-7 + 2e-7 * std::abs(exponent)) + 2e-37;
    is_close = is_close && std::abs(static_cast<double>(weights[i]) - want[i]) <= bound &&
               (weights[i] == 0) == (want[i] < 1.6e-38);
  }
  expect(is_close, what + ": weights");
  expect(weights.back() == -7.0f, what + ": nothing is written behind the weights");
  expect(std::abs(static_cast<double>(sum_weights(logits, by)) - sum) <= 1e-5 * sum, what + ": sum");
  expect(std::abs(sum_weights_in_double(logits, by) - sum) <= 1e-14 * sum, what + ": sum in double");
}

void test_logits(size_t size) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  std::mt19937 generator(static_cast<unsigned>(size));
  std::normal_distribution<float> normal(0.0f, 4.0f);
  const std::string what = "logits of " + std::to_string(size);
  std::vector<float> logits(size);
  for (float& x : logits) x = normal(generator);
  if (size > 3) logits[size - 2] = -kInf;
  const float largest = *std::max_element(logits.begin(), logits.end());
  expect(largest_logit(logits, {}) == largest, what + ": largest");
  for (const float least : {largest, 0.0f, logits[size / 2], std::numeric_limits<float>::lowest()}) {
    if (std::isinf(least)) continue;
    const auto want = std::count_if(logits.begin(), logits.end(), [&](float x) { return x >= least; });
    expect(count_logits(logits, least) == want, what + ": count");
    for (const double temperature : {0.01, 0.7, 1.0, 30.0, 1e30}) {
      expect_weights(logits, {.least = least, .largest = largest, .rate = 1 / temperature}, what);
    }
  }
  for (const size_t nan : {size_t{0}, size / 2, size - 1}) {
    std::vector<float> broken = logits;
    broken[nan] = std::numeric_limits<float>::quiet_NaN();
    expect(std::isnan(largest_logit(broken, logits)), what + ": NaN");
  }
  std::vector<uint32_t> allowed((size + 31) / 32);
  for (size_t i = 0; i < allowed.size(); ++i) allowed[i] = i % 3 == 0 ? generator() : uint32_t{0} - i % 3 / 2;
  std::vector<float> masked = logits;
  forbid_logits(allowed, masked);
  bool is_right = true;
  for (size_t i = 0; i < size; ++i) {
    is_right = is_right && masked[i] == ((allowed[i / 32] >> i % 32 & 1) != 0 ? logits[i] : -kInf);
  }
  expect(is_right, what + ": mask");
}

void test_target(int64_t target) {
  instruction_set = hwy::TargetName(target);
  std::printf("%s\n", instruction_set.c_str());
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const DType state_dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const int64_t K : {16, 48, 128}) {
        for (const int64_t tokens : {1, 4}) {
          test_rule("delta rule", &Rule::args, tokens, K, /*V=*/32, dtype, state_dtype);
        }
        for (const int64_t tokens : {1, 33, 64, 70}) {
          test_rule("chunks", &Rule::chunk_args, tokens, K, /*V=*/48, dtype, state_dtype);
        }
        for (const int64_t tokens : {1, 15, 16, 40}) test_replay(tokens, K, /*V=*/48, dtype, state_dtype);
        test_verification(K, /*V=*/32, state_dtype);
        for (const bool has_replay_states : {false, true}) {
          test_decode_step(K, /*V=*/48, dtype, state_dtype, has_replay_states);
        }
      }
    }
    for (const int64_t W : {2, 3, 4}) test_conv(W, dtype);
    test_norm_and_gating(dtype);
    for (const int64_t D : {16, 20, 96}) {
      for (const bool has_residual : {false, true}) test_rms_norm(D, dtype, has_residual);
    }
    test_rotation(/*D=*/96, /*P=*/24, dtype);
    test_rotation(/*D=*/20, /*P=*/6, dtype);
    for (const int64_t I : {5, 256, 300}) test_silu_and_mul(I, dtype);
    for (const int64_t D : {5, 256, 300}) test_sigmoid_and_mul(D, dtype);
    for (const float q_size : {1.0f, 30.0f}) {
      test_attention(/*group=*/1, /*D=*/40, /*block_size=*/16, dtype, q_size);
      test_attention(/*group=*/4, /*D=*/64, /*block_size=*/1, dtype, q_size);
    }
    test_attention(/*group=*/3, /*D=*/256, /*block_size=*/48, dtype, /*q_size=*/1);
    for (const int64_t D : {20, 64, 256}) {
      test_store_codes(D, dtype);
      test_attention(/*group=*/4, D, /*block_size=*/16, dtype, /*q_size=*/1, /*products=*/nullptr, /*is_int8=*/true);
    }
  }
  for (const int64_t bits : {8, 16}) {
    for (const Codes format : {Codes::kInt8, Codes::kInt4}) test_quantized_linears(format, bits);
  }
  test_quantized_linears(Codes::kFloat8, /*bits=*/16);
  for (const size_t size : {1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 100, 1000, 1024}) test_logits(size);
  for (const int64_t T : {1, 2, 3, 4, 5, 8, 11, 16}) {
    for (const int64_t O : {1, 16, 41}) test_linear_f32(T, /*D=*/T == 5 ? 2080 : 96, O, /*has_bias=*/T % 2 == 1);
  }
  test_linear_by_rows(linear_by_widened_rows);
  const bool has_pairs = target == HWY_AVX3 && bfloat16_products() != nullptr;
  for (const int64_t T : {1, 7, 45}) {
    for (const Codes a : {Codes::kInt8, Codes::kInt4, Codes::kFloat8}) {
      for (const Codes b : {Codes::kInt8, Codes::kInt4, Codes::kFloat8}) {
        test_quantized_experts(T, a, b, T == 7 ? DType::kBFloat16 : DType::kFloat32, /*has_zeros=*/T > 1);
      }
    }
    test_experts(T, /*products=*/nullptr, /*is_paired=*/false);
    if (has_pairs) test_experts(T, /*products=*/nullptr, /*is_paired=*/true);
    test_experts(T, &kPlainProducts, /*is_paired=*/false);
    if (has_pairs) test_experts(T, bfloat16_products(), /*is_paired=*/false);
  }
  if (has_pairs) test_linear_by_rows(linear_by_paired_rows);
  for (const BFloat16Products* products : {&kPlainProducts, bfloat16_products()}) {
    if (products != nullptr) {
      test_linear_with(packed_linear(products));
      test_attention(/*group=*/1, /*D=*/40, /*block_size=*/16, DType::kBFloat16, /*q_size=*/1, products);
      test_attention(/*group=*/3, /*D=*/256, /*block_size=*/1, DType::kBFloat16, /*q_size=*/30, products);
      test_attention(/*group=*/3, /*D=*/40, /*block_size=*/7, DType::kBFloat16, /*q_size=*/1, products,
                     /*is_int8=*/true);
    }
    test_fast_chunks_with(products);
  }
}

}  // namespace
}  // namespace xgdn::kernel::cpu

int main() {
#if defined(HWY_COMPILE_ONLY_STATIC)
  xgdn::kernel::cpu::test_target(HWY_STATIC_TARGET);
#else
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    xgdn::kernel::cpu::test_target(target);
  }
#endif
  return xgdn::kernel::cpu::failures == 0 ? 0 : 1;
}
