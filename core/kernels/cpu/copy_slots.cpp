// SPDX-License-Identifier: Apache-2.0
// pool[to[n]] = pool[from[n]].
//
// Loop: pool -> row. Bytes are copied, nothing is rounded.
#include "core/kernels/cpu/copy_slots.h"

#include <cstring>

namespace xgdn::kernel::cpu {

int64_t num_work_items(const CopySlotsArgs& args) {
  return static_cast<int64_t>(args.pools.size()) * args.N;
}

void copy_slots(const CopySlotsArgs& args, int64_t begin_item, int64_t end_item) {
  for (int64_t item = begin_item; item < end_item; ++item) {
    const PoolBytes& pool = args.pools[static_cast<size_t>(item / args.N)];
    const int64_t from = args.from[item % args.N];
    const int64_t to = args.to[item % args.N];
    if (from < 0 || to < 0 || from == to) continue;
    std::memcpy(pool.data + to * pool.slot_stride, pool.data + from * pool.slot_stride,
                static_cast<size_t>(pool.slot_size));
  }
}

}  // namespace xgdn::kernel::cpu
