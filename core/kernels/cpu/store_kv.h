// SPDX-License-Identifier: Apache-2.0
// The rows of a paged cache on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"
#include "core/kernels/cpu/kv_rows.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops. The caches are seen as their rows, of all blocks one after another.
struct StoreKvArgs {
  int64_t HKV = 0;
  int64_t D = 0;
  InRows k;  // [T, HKV, D]
  InRows v;  // [T, HKV, D]
  KvRows cache_rows;
  void* k_cache = nullptr;        // [rows, HKV]
  void* v_cache = nullptr;        // [rows, HKV]
  const int32_t* rows = nullptr;  // [T]  negative: the token is not stored
};

void store_kv(const StoreKvArgs& args, int64_t begin_token, int64_t end_token);

}  // namespace xgdn::kernel::cpu
