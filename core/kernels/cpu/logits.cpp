// SPDX-License-Identifier: Apache-2.0
// weight(x) = exp((x - largest) rate) if x >= least, else 0, and what else a token is chosen by.
//
// Loop: lanes. What is missing in the last vector is -infinity: never the largest, never counted, of no weight.
// Rounding: of weights in f32 the exponent is rounded twice and the exp to about one unit in the last place; a lane
// adds every lanes-th weight in f32. In double only the sum and the exp are rounded, and the product by the rate.
#include "core/kernels/ops/logits.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/logits.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include <limits>

#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

using F64 = hn::CappedTag<double, kMaxLanes / 2>;
using I64 = hn::RebindToSigned<F64>;
using HalfF32 = hn::Rebind<float, F64>;  // as many lanes as F64 has

// Calls f(vector, position) for all vectors of floats, with -infinity behind the last.
template <class D, class F>
HWY_INLINE void for_each_vector(D d, std::span<const float> x, const F& f) {
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= x.size(); i += lanes) f(hn::LoadU(d, x.data() + i), i);
  if (i == x.size()) return;
  float tail[kMaxLanes];
  for (float& element : tail) element = kForbidden;
  std::memcpy(tail, x.data() + i, (x.size() - i) * sizeof(float));
  f(hn::LoadU(d, tail), i);
}

float largest_logit(std::span<const float> logits, std::span<const float> next) {
  const F32 d;
  prefetch(next.data(), next.size_bytes());
  VF largest = hn::Set(d, kForbidden);
  VF other = largest;  // NaN once one has come: Max may drop it
  for_each_vector(d, logits, [&](VF x, size_t) HWY_ATTR {
    largest = hn::Max(largest, x);
    other = hn::IfThenElse(hn::IsNaN(x), x, other);
  });
  if (!hn::AllFalse(d, hn::IsNaN(other))) return std::numeric_limits<float>::quiet_NaN();
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

int64_t count_logits(std::span<const float> logits, float least) {
  const F32 d;
  const VF least_lane = hn::Set(d, least);
  size_t count = 0;
  for_each_vector(d, logits, [&](VF x, size_t) HWY_ATTR { count += hn::CountTrue(d, hn::Ge(x, least_lane)); });
  return static_cast<int64_t>(count);
}

// ---- weights --------------------------------------------------------------------------------------------------------

class Weigher {
 public:
  explicit HWY_INLINE Weigher(const LogitWeights& by) : by_(by), rate_(static_cast<float>(by.rate)) {}

  HWY_INLINE VF operator()(F32 d, VF x) const {
    constexpr float kLeast = -87.0f;  // above ln 2^-126: a weight is a normal number
    const VF exponent = hn::Mul(hn::Sub(x, hn::Set(d, by_.largest)), hn::Set(d, rate_));
    VF p, n;
    split_exp(d, hn::Max(exponent, hn::Set(d, kLeast)), p, n);
    const auto is_kept = hn::And(hn::Ge(x, hn::Set(d, by_.least)), hn::Ge(exponent, hn::Set(d, kLeast)));
    return hn::IfThenElseZero(is_kept, multiply_by_power(d, p, n));
  }

 private:
  LogitWeights by_;
  float rate_;
};

void weigh_logits(std::span<const float> logits, const LogitWeights& by, std::span<float> weights) {
  const F32 d;
  const Weigher weigh(by);
  for_each_vector(d, logits, [&](VF x, size_t i) HWY_ATTR {
    if (i + hn::Lanes(d) <= weights.size()) {
      hn::StoreU(weigh(d, x), d, weights.data() + i);
      return;
    }
    float tail[kMaxLanes];
    hn::StoreU(weigh(d, x), d, tail);
    std::memcpy(weights.data() + i, tail, (weights.size() - i) * sizeof(float));
  });
}

float sum_weights(std::span<const float> logits, const LogitWeights& by) {
  const F32 d;
  const Weigher weigh(by);
  VF sum = hn::Zero(d);
  for_each_vector(d, logits, [&](VF x, size_t) HWY_ATTR { sum = hn::Add(sum, weigh(d, x)); });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// e^x for -708 <= x <= 0, as in split_exp: p by its series, whose next term is below 2^-52 / 2.
HWY_INLINE hn::Vec<F64> exp_in_double(F64 d, hn::Vec<F64> x) {
  // Beside this number a double has no bits for a fraction; its last ones are n.
  const auto whole = hn::Set(d, 0x1.8p52);
  const auto shifted = hn::MulAdd(x, hn::Set(d, 1.4426950408889634), whole);
  const auto n = hn::Sub(shifted, whole);
  // ln 2 in two parts: n times the first is exact.
  const auto high = hn::NegMulAdd(n, hn::Set(d, 0x1.62e42fee00000p-1), x);
  const auto r = hn::NegMulAdd(n, hn::Set(d, 0x1.a39ef35793c76p-33), high);
  auto p = hn::Set(d, 1.0 / 479001600);
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 39916800));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 3628800));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 362880));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 40320));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 5040));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 720));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 120));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 24));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0 / 6));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5));
  p = hn::Add(hn::MulAdd(hn::Mul(p, r), r, r), hn::Set(d, 1.0));
  const I64 i;
  const auto power = hn::ShiftLeft<52>(hn::Add(hn::BitCast(i, shifted), hn::Set(i, 1023)));
  return hn::Mul(p, hn::BitCast(d, power));
}

double sum_weights_in_double(std::span<const float> logits, const LogitWeights& by) {
  constexpr double kLeast = -708.0;  // above ln 2^-1022
  const F64 d;
  auto sum = hn::Zero(d);
  for_each_vector(HalfF32(), logits, [&](hn::Vec<HalfF32> narrow, size_t) HWY_ATTR {
    const auto x = hn::PromoteTo(d, narrow);
    const auto exponent = hn::Mul(hn::Sub(x, hn::Set(d, by.largest)), hn::Set(d, by.rate));
    const auto is_kept = hn::And(hn::Ge(x, hn::Set(d, by.least)), hn::Ge(exponent, hn::Set(d, kLeast)));
    sum = hn::Add(sum, hn::IfThenElseZero(is_kept, exp_in_double(d, hn::Max(exponent, hn::Set(d, kLeast)))));
  });
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// ---- masks ----------------------------------------------------------------------------------------------------------

constexpr size_t kWordBits = 32;

// `logits`: 32 of them.
HWY_INLINE void forbid_word(uint32_t allowed, float* HWY_RESTRICT logits) {
  const F32 d;
  const U32 u;
  const VF forbidden = hn::Set(d, kForbidden);
  for (size_t i = 0; i < kWordBits; i += hn::Lanes(d)) {
    const auto bit = hn::Shl(hn::Set(u, 1), hn::Iota(u, static_cast<uint32_t>(i)));
    const auto is_allowed = hn::RebindMask(d, hn::TestBit(hn::Set(u, allowed), bit));
    hn::StoreU(hn::IfThenElse(is_allowed, hn::LoadU(d, logits + i), forbidden), d, logits + i);
  }
}

void forbid_logits(std::span<const uint32_t> allowed, std::span<float> logits) {
  const size_t whole = logits.size() / kWordBits;
  for (size_t word = 0; word < whole; ++word) {
    if (allowed[word] != ~uint32_t{0}) forbid_word(allowed[word], logits.data() + word * kWordBits);
  }
  for (size_t i = whole * kWordBits; i < logits.size(); ++i) {
    if ((allowed[whole] >> i % kWordBits & 1) == 0) logits[i] = kForbidden;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {
namespace {

HWY_EXPORT(largest_logit);
HWY_EXPORT(count_logits);
HWY_EXPORT(weigh_logits);
HWY_EXPORT(sum_weights);
HWY_EXPORT(sum_weights_in_double);
HWY_EXPORT(forbid_logits);

}  // namespace
}  // namespace xgdn::kernel::cpu

namespace xgdn::kernel {

float largest_logit(std::span<const float> logits, std::span<const float> next) {
  using namespace cpu;
  return HWY_DYNAMIC_DISPATCH(largest_logit)(logits, next);
}

int64_t count_logits(std::span<const float> logits, float least) {
  using namespace cpu;
  return HWY_DYNAMIC_DISPATCH(count_logits)(logits, least);
}

void weigh_logits(std::span<const float> logits, const LogitWeights& by, std::span<float> weights) {
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(weigh_logits)(logits, by, weights);
}

float sum_weights(std::span<const float> logits, const LogitWeights& by) {
  using namespace cpu;
  return HWY_DYNAMIC_DISPATCH(sum_weights)(logits, by);
}

double sum_weights_in_double(std::span<const float> logits, const LogitWeights& by) {
  using namespace cpu;
  return HWY_DYNAMIC_DISPATCH(sum_weights_in_double)(logits, by);
}

void forbid_logits(std::span<const uint32_t> allowed, std::span<float> logits) {
  using namespace cpu;
  HWY_DYNAMIC_DISPATCH(forbid_logits)(allowed, logits);
}

}  // namespace xgdn::kernel
#endif  // HWY_ONCE
