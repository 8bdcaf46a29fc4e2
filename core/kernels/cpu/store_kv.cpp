// SPDX-License-Identifier: Apache-2.0
// k_cache[rows[t]] = k[t], v_cache[rows[t]] = v[t].
//
// Loop: token -> k, v -> head. Rounding: rows of the tokens' dtype are copied; int8 codes are 127 / max |x| times the
// f32 value of x, to nearest even, behind them the scale max |x| / 127. Where max |x| is below 2^-100 all is zero; a
// row that has an infinity or a NaN has the scale NaN.
#include "core/kernels/cpu/store_kv.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/kernels/cpu/store_kv.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "core/kernels/cpu/group_scale-inl.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

// `x` has room for padded(D) floats, of which those behind D are zero.
void store_codes(const InRows& tokens, int64_t token, int64_t head, int64_t D, float* HWY_RESTRICT x, char* to) {
  const F32 d;
  const hn::Rebind<int8_t, F32> bytes;
  load_row(tokens.dtype, tokens.at(token, head), static_cast<size_t>(D), x);
  const GroupScale group = group_scale(x, padded(D), /*most=*/127.0f);
  const VF inverse = hn::Set(d, group.inverse);
  int8_t codes[kMaxLanes];
  for (int64_t i = 0; i < D; i += static_cast<int64_t>(hn::Lanes(d))) {
    const VF xi = group.inverse == 0 ? hn::Zero(d) : hn::Mul(hn::LoadU(d, x + i), inverse);
    hn::StoreU(hn::DemoteTo(bytes, hn::NearestInt(xi)), bytes, codes);
    std::memcpy(to + i, codes, static_cast<size_t>(std::min<int64_t>(D - i, static_cast<int64_t>(hn::Lanes(d)))));
  }
  std::memcpy(to + D, &group.scale, sizeof(group.scale));
}

void store_row(const StoreKvArgs& args, const InRows& tokens, int64_t token, void* cache, float* x) {
  for (int64_t head = 0; head < args.HKV; ++head) {
    char* to = static_cast<char*>(cache) + (args.rows[token] * args.HKV + head) * args.cache_rows.bytes;
    if (args.cache_rows.are_int8) {
      store_codes(tokens, token, head, args.D, x, to);
    } else {
      std::memcpy(to, tokens.at(token, head), static_cast<size_t>(args.cache_rows.bytes));
    }
  }
}

void store_kv(const StoreKvArgs& args, int64_t begin_token, int64_t end_token) {
  float* x = zeroed_scratch<StoreKvArgs>(padded(args.D));
  for (int64_t token = begin_token; token < end_token; ++token) {
    if (args.rows[token] < 0) continue;
    store_row(args, args.k, token, args.k_cache, x);
    store_row(args, args.v, token, args.v_cache, x);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace xgdn::kernel::cpu {

HWY_EXPORT(store_kv);

void store_kv(const StoreKvArgs& args, int64_t begin_token, int64_t end_token) {
  HWY_DYNAMIC_DISPATCH(store_kv)(args, begin_token, end_token);
}

}  // namespace xgdn::kernel::cpu
#endif  // HWY_ONCE
