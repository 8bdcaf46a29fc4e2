// SPDX-License-Identifier: Apache-2.0
// A layer's decode step in one pass over the heads: convolution, SiLU, l2norm, gating, delta rule, gated RMS norm; on
// plain states or on replay states.
//
// Loop: key head and sequence (a work item) -> value heads of the key head. What one op hands to the next stays in the
// first-level cache. On plain states sequences come fastest, so that the taps of a head's channels are loaded once; on
// replay states heads do, as the checkpoints lie in the pool, which are most of what is read.
// Rounding: as if the ops ran one after the other: q, k, v and o are rounded to the type of the activations between
// them. The same functions as in the ops (the -inl headers), so the same bits.
#include "core/kernels/cpu/gdn_decode_step.h"

#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/gdn_decode_step.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/causal_conv1d-inl.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule-inl.h"
#include "core/kernels/cpu/recurrent_gated_delta_rule.h"
#include "core/kernels/cpu/replay_gated_delta_rule-inl.h"
#include "core/kernels/cpu/rms_norm_gated-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// ---- around the rule ------------------------------------------------------------------------------------------------

// The tokens of a step, one a sequence: convolved on their way into the rule, normed on their way out. The rows that
// they come and go in are aligned as scratch memory.
class StepTokens {
 public:
  explicit StepTokens(const DecodeStepArgs& args) : args_(args), ratio_(args.rule.HV / args.rule.H) {
    z_ = zeroed_scratch<StepTokens>(static_cast<size_t>(kConvBlock * (2 + kMaxTaps + (2 + ratio_) * kBlockRows)));
    norm_weight_ = row(z_, 1);
    window_ = row(z_, 2);
    blocks_ = row(window_, kMaxTaps);
    load_row(args.norm.weight.dtype, args.norm.weight.data, args.rule.V, norm_weight_);
  }

  ReplayItem item(int64_t index) const { return {index / args_.rule.H, index % args_.rule.H}; }

  void load_keys(int64_t n, int64_t key_head, float* k, float* q) {
    if (key_head != key_head_) load_head_taps(key_head);
    convolve_channels(n, 0, q_channel(key_head), args_.rule.K, q);
    convolve_channels(n, 1, k_channel(key_head), args_.rule.K, k);
  }
  // After the keys of its key head.
  void load_value(int64_t n, int64_t h, float* v) const {
    convolve_channels(n, 2 + h % ratio_, v_channel(h), args_.rule.V, v);
  }
  TokenGates gates(int64_t n, int64_t h) const { return load_gates(args_.rule, n, h); }
  void store(int64_t n, int64_t h, float* o) const {
    const RmsNormGatedArgs& norm = args_.norm;
    round_row(args_.rule.out.dtype, norm.V, o);
    load_row(norm.z.dtype, norm.z.at(n, h), norm.V, z_);
    norm_row(o, norm_weight_, norm.V, norm.eps, z_);
    store_row(norm.out.dtype, z_, norm.V, norm.out.at(n, h));
  }
  void store_zeros(int64_t n, int64_t h) const {
    std::memset(args_.norm.out.at(n, h), 0, args_.norm.V * size_of(args_.norm.out.dtype));
  }

  // Calls f(begin, bytes) for what is read of a token, in the channels of q and k.
  template <class F>
  void for_keys(int64_t n, int64_t key_head, const F& f) const {
    for_channels(n, q_channel(key_head), args_.rule.K, f);
    for_channels(n, k_channel(key_head), args_.rule.K, f);
  }
  // And in those of v and z of some value heads.
  template <class F>
  void for_values(int64_t n, int64_t first, int64_t count, const F& f) const {
    const int64_t values = count * args_.rule.V;
    for_channels(n, v_channel(first), values, f);
    f(args_.norm.z.at(n, first), static_cast<size_t>(values * size_of(args_.norm.z.dtype)));
  }

  void add_keys(int64_t n, int64_t key_head, Fetches& ahead) const {
    for_keys(n, key_head, [&](const void* begin, size_t bytes) { ahead.add(begin, bytes); });
  }
  void add_value(int64_t n, int64_t h, Fetches& ahead) const {
    for_values(n, h, 1, [&](const void* begin, size_t bytes) { ahead.add(begin, bytes); });
    ahead.add(args_.norm.out.at(n, h), static_cast<size_t>(args_.norm.V * size_of(args_.norm.out.dtype)));
  }

 private:
  static constexpr int64_t kBlockRows = kMaxTaps + 1;  // taps and bias

  // Channels of q, k and v lie one behind the other.
  int64_t q_channel(int64_t key_head) const { return key_head * args_.rule.K; }
  int64_t k_channel(int64_t key_head) const { return (args_.rule.H + key_head) * args_.rule.K; }
  int64_t v_channel(int64_t head) const { return 2 * args_.rule.H * args_.rule.K + head * args_.rule.V; }

  ConvBlock block(int64_t index, float* out) const {
    ConvBlock b;
    b.taps = row(blocks_, index * kBlockRows);
    b.bias = row(b.taps, kMaxTaps);
    b.history = nullptr;  // the window holds it
    b.window = window_;
    b.out = out;
    return b;
  }

  // Of q, of k, of each value head's v.
  void load_head_taps(int64_t key_head) {
    key_head_ = key_head;
    const auto load = [&](int64_t index, int64_t first, int64_t count) {
      ConvBlock b = block(index, nullptr);
      load_taps(args_.conv, first, count, b);
    };
    load(0, q_channel(key_head), args_.rule.K);
    load(1, k_channel(key_head), args_.rule.K);
    for (int64_t i = 0; i < ratio_; ++i) load(2 + i, v_channel(key_head * ratio_ + i), args_.rule.V);
  }

  void convolve_channels(int64_t n, int64_t index, int64_t first, int64_t count, float* out) const {
    ConvBlock b = block(index, out);
    b.first = first;
    b.count = count;
    convolve_decode(args_.conv, n, /*token=*/n, /*first_row=*/0, b);
    round_row(args_.conv.x.dtype, count, out);
  }

  template <class F>
  void for_channels(int64_t n, int64_t first, int64_t count, const F& f) const {
    const CausalConv1dArgs& conv = args_.conv;
    f(channel(conv.x.at(n, 0), conv.x.dtype, first), static_cast<size_t>(count * size_of(conv.x.dtype)));
    if (conv.conv_state.read[n] < 0) return;
    ConvBlock b;
    b.first = first;
    for (int64_t r = 0; r < conv.W - 1; ++r) {
      f(state_row(conv, b, conv.conv_state.read[n], r), static_cast<size_t>(count * size_of(conv.conv_state.dtype)));
    }
  }

  const DecodeStepArgs& args_;
  const int64_t ratio_;    // value heads of a key head
  int64_t key_head_ = -1;  // whose taps are loaded

  // Rows in f32, kConvBlock apart.
  float* z_;
  float* norm_weight_;
  float* window_;  // [kMaxTaps]
  float* blocks_;  // [2 + ratio, kBlockRows]
};
static_assert(kMaxHeadDim <= kConvBlock);

// ---- on plain states ------------------------------------------------------------------------------------------------

class PlainStep {
 public:
  explicit PlainStep(const DecodeStepArgs& args)
      : args_(args), ratio_(args.rule.HV / args.rule.H), tokens_(args), q_(scratch<PlainStep>(4 * kConvBlock)) {
    k_ = row(q_, 1);
    v_ = row(q_, 2);
    o_ = row(q_, 3);
  }

  template <typename State>
  void run(int64_t begin, int64_t end) {
    const int64_t N = args_.rule.N;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index % N, key_head = index / N;
      const State* next = nullptr;
      if (index + 1 < end) {
        const int64_t next_n = (index + 1) % N, next_key_head = (index + 1) / N;
        next = rows<State>(next_key_head * ratio_, args_.rule.state.read[next_n]);
        const auto fetch = [](const void* from, size_t bytes) { prefetch(from, bytes); };
        tokens_.for_keys(next_n, next_key_head, fetch);
        tokens_.for_values(next_n, next_key_head * ratio_, ratio_, fetch);
      }
      if (args_.rule.state.read[n] < 0) {
        for (int64_t i = 0; i < ratio_; ++i) tokens_.store_zeros(n, key_head * ratio_ + i);
      } else {
        step_heads<State>(n, key_head, next);
      }
    }
  }

 private:
  template <typename State>
  State* rows(int64_t head, int32_t slot) const {
    if (slot < 0) return nullptr;
    return args_.rule.state.slot<State>(slot) + head * args_.rule.V * args_.rule.K;
  }

  template <typename State>
  void step_heads(int64_t n, int64_t key_head, const void* next) {
    const TokenDeltaRuleArgs& rule = args_.rule;
    const int64_t first = key_head * ratio_;
    const int32_t read = rule.state.read[n];
    prefetch(rows<State>(first, read), kPrefetchBytes);  // while the token is staged
    tokens_.load_keys(n, key_head, k_, q_);
    Token token;
    token.k = k_;
    token.q = q_;
    token.v = v_;
    token.o = o_;
    token.scale = rule.scale;
    token.kq = stage_keys<State>(k_, q_, rule.K, rule.normalise_qk);
    for (int64_t h = first; h < first + ratio_; ++h) {
      const State* src = rows<State>(h, read);
      tokens_.load_value(n, h, v_);
      stage_gates(tokens_.gates(n, h), token);
      const void* following = h + 1 < first + ratio_ ? src + rule.V * rule.K : next;
      step(token, src, rows<State>(h, rule.state.write[n]), rule.V, rule.K, following);
      tokens_.store(n, h, o_);
    }
  }

  const DecodeStepArgs& args_;
  const int64_t ratio_;
  StepTokens tokens_;
  float* q_;  // rows in f32, kConvBlock apart
  float* k_;
  float* v_;
  float* o_;
};

// ---- both -----------------------------------------------------------------------------------------------------------

void gdn_decode_step(const DecodeStepArgs& args, int64_t begin, int64_t end) {
  if (args.has_replay_states()) {
    StepTokens tokens(args);
    return replay_items(replay_args(args), tokens, begin, end);
  }
  PlainStep plain(args);
  with_state_type(args.rule.state.dtype, [&](auto element) { plain.template run<decltype(element)>(begin, end); });
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(gdn_decode_step);

void gdn_decode_step(const DecodeStepArgs& args, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(gdn_decode_step)(args, begin, end);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
