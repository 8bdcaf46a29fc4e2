// SPDX-License-Identifier: Apache-2.0
// k_cache[rows[t]] = k[t], v_cache[rows[t]] = v[t].
//
// Loop: token -> k, v -> head. Bytes are copied, nothing is rounded.
#include "core/kernels/cpu/store_kv.h"

#include <cstring>

namespace xgdn::kernel::cpu {
namespace {

void store_row(const StoreKvArgs& args, const InRows& tokens, int64_t token, const OutRows& cache, int64_t row) {
  const auto bytes = static_cast<size_t>(args.D * size_of(tokens.dtype));
  for (int64_t head = 0; head < args.HKV; ++head) std::memcpy(cache.at(row, head), tokens.at(token, head), bytes);
}

}  // namespace

void store_kv(const StoreKvArgs& args, int64_t begin_token, int64_t end_token) {
  for (int64_t token = begin_token; token < end_token; ++token) {
    const int64_t row = args.rows[token];
    if (row < 0) continue;
    store_row(args, args.k, token, args.k_cache, row);
    store_row(args, args.v, token, args.v_cache, row);
  }
}

}  // namespace xgdn::kernel::cpu
