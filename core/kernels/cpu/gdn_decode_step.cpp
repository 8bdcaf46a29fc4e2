// SPDX-License-Identifier: Apache-2.0
// A layer's decode step in one pass over the heads: convolution, SiLU, l2norm, gating, delta rule, gated RMS norm.
//
// Loop: key head -> sequence (a work item) -> value heads of the key head. The taps of the head's channels are loaded
// once and serve all sequences of a range; what one op hands to the next stays in the first-level cache.
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
#include "core/kernels/cpu/rms_norm_gated-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// Rows in f32, kConvBlock apart.
struct DecodeScratch {
  float* q;
  float* k;
  float* v;
  float* o;
  float* z;
  float* norm_weight;
  float* window;  // [kMaxTaps]
  float* blocks;  // of q, of k, of each value head's v: [kMaxTaps + 1]
};

inline constexpr size_t kDecodeRows = 6 + kMaxTaps;
inline constexpr size_t kRowsPerBlock = kMaxTaps + 1;
static_assert(kMaxHeadDim <= kConvBlock);

class DecodeStep {
 public:
  explicit DecodeStep(const DecodeStepArgs& args) : args_(args), ratio_(args.rule.HV / args.rule.H) {
    float* next = zeroed_scratch<DecodeScratch>(kConvBlock * (kDecodeRows + (2 + ratio_) * kRowsPerBlock));
    const auto take = [&next](size_t rows) {
      float* taken = next;
      next += rows * kConvBlock;
      return taken;
    };
    s_ = {take(1), take(1), take(1), take(1), take(1), take(1), take(kMaxTaps), next};
    load_row(args.norm.weight.dtype, args.norm.weight.data, args.rule.V, s_.norm_weight);
  }

  template <typename State>
  void run(int64_t begin, int64_t end) {
    const int64_t N = args_.rule.N;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t key_head = item / N;
      const State* next = nullptr;
      if (item + 1 < end) {
        next = source<State>((item + 1) / N * ratio_, (item + 1) % N);
        prefetch_token((item + 1) / N, (item + 1) % N);
      }
      if (args_.rule.state.read[item % N] < 0) {
        write_zeros(key_head, item % N);
        continue;
      }
      if (key_head != key_head_) load_head_taps(key_head);
      step_head<State>(item % N, next);
    }
  }

 private:
  // Channels of q, k and v lie one behind the other.
  int64_t q_channel(int64_t key_head) const { return key_head * args_.rule.K; }
  int64_t k_channel(int64_t key_head) const { return (args_.rule.H + key_head) * args_.rule.K; }
  int64_t v_channel(int64_t head) const { return 2 * args_.rule.H * args_.rule.K + head * args_.rule.V; }

  ConvBlock block(int64_t index, float* out) const {
    float* taps = s_.blocks + index * kRowsPerBlock * kConvBlock;
    ConvBlock b;
    b.taps = taps;
    b.bias = taps + kMaxTaps * kConvBlock;
    b.history = nullptr;  // the window holds it
    b.window = s_.window;
    b.out = out;
    return b;
  }

  void load_head_taps(int64_t key_head) {
    key_head_ = key_head;
    ConvBlock q = block(0, s_.q), k = block(1, s_.k);
    load_taps(args_.conv, q_channel(key_head), args_.rule.K, q);
    load_taps(args_.conv, k_channel(key_head), args_.rule.K, k);
    for (int64_t i = 0; i < ratio_; ++i) {
      ConvBlock v = block(2 + i, s_.v);
      load_taps(args_.conv, v_channel(key_head * ratio_ + i), args_.rule.V, v);
    }
  }

  void convolve_channels(int64_t n, int64_t index, int64_t first, int64_t count, float* out) const {
    ConvBlock b = block(index, out);
    b.first = first;
    b.count = count;
    convolve_decode(args_.conv, n, /*token=*/n, /*first_row=*/0, b);
    round_row(args_.conv.x.dtype, count, out);
  }

  template <typename State>
  State* rows(int64_t head, int32_t slot) const {
    if (slot < 0) return nullptr;
    return args_.rule.state.slot<State>(slot) + head * args_.rule.V * args_.rule.K;
  }
  template <typename State>
  const State* source(int64_t head, int64_t n) const {
    return rows<State>(head, args_.rule.state.read[n]);
  }

  // The channels of a key head in the token and in the convolution's history.
  void prefetch_token(int64_t key_head, int64_t n) const {
    const int64_t values = ratio_ * args_.rule.V;
    prefetch_channels(n, q_channel(key_head), args_.rule.K);
    prefetch_channels(n, k_channel(key_head), args_.rule.K);
    prefetch_channels(n, v_channel(key_head * ratio_), values);
    prefetch(args_.norm.z.at(n, key_head * ratio_), values * size_of(args_.norm.z.dtype));
  }

  void prefetch_channels(int64_t n, int64_t first, int64_t count) const {
    const CausalConv1dArgs& conv = args_.conv;
    prefetch(channel(conv.x.at(n, 0), conv.x.dtype, first), count * size_of(conv.x.dtype));
    if (conv.conv_state.read[n] < 0) return;
    ConvBlock b;
    b.first = first;
    for (int64_t r = 0; r < conv.W - 1; ++r) {
      prefetch(state_row(conv, b, conv.conv_state.read[n], r), count * size_of(conv.conv_state.dtype));
    }
  }

  void write_zeros(int64_t key_head, int64_t n) const {
    for (int64_t h = key_head * ratio_; h < (key_head + 1) * ratio_; ++h) {
      std::memset(args_.norm.out.at(n, h), 0, args_.rule.V * size_of(args_.norm.out.dtype));
    }
  }

  template <typename State>
  void step_head(int64_t n, const void* next) const {
    const TokenDeltaRuleArgs& rule = args_.rule;
    const int64_t first = key_head_ * ratio_;
    prefetch(source<State>(first, n), kPrefetchBytes);  // while the token is staged
    convolve_channels(n, 0, q_channel(key_head_), rule.K, s_.q);
    convolve_channels(n, 1, k_channel(key_head_), rule.K, s_.k);
    Token token;
    token.k = s_.k;
    token.q = s_.q;
    token.v = s_.v;
    token.o = s_.o;
    token.scale = rule.scale;
    token.kq = stage_keys<State>(s_.k, s_.q, rule.K, rule.normalise_qk);
    for (int64_t h = first; h < first + ratio_; ++h) {
      const State* src = source<State>(h, n);
      convolve_channels(n, 2 + h - first, v_channel(h), rule.V, s_.v);
      stage_logits(load_scalar(rule.g.dtype, rule.g.at(n, h)), load_scalar(rule.beta.dtype, rule.beta.at(n, h)),
                   load_scalar(rule.A_log.dtype, rule.A_log.at(0, h)),
                   load_scalar(rule.dt_bias.dtype, rule.dt_bias.at(0, h)), token);
      const void* following = h + 1 < first + ratio_ ? src + rule.V * rule.K : next;
      step(token, src, rows<State>(h, rule.state.write[n]), rule.V, rule.K, following);
      round_row(rule.out.dtype, rule.V, s_.o);
      load_row(args_.norm.z.dtype, args_.norm.z.at(n, h), rule.V, s_.z);
      norm_row(s_.o, s_.norm_weight, rule.V, args_.norm.eps, s_.z);
      store_row(args_.norm.out.dtype, s_.z, rule.V, args_.norm.out.at(n, h));
    }
  }

  const DecodeStepArgs& args_;
  const int64_t ratio_;
  DecodeScratch s_;
  int64_t key_head_ = -1;  // whose taps are loaded
};

void gdn_decode_step(const DecodeStepArgs& args, int64_t begin, int64_t end) {
  DecodeStep decode(args);
  with_state_type(args.rule.state.dtype, [&](auto element) { decode.template run<decltype(element)>(begin, end); });
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
