// SPDX-License-Identifier: Apache-2.0
// Copies of slots on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>
#include <vector>

namespace xgdn::kernel::cpu {

/// A pool of any type; all in bytes.
struct PoolBytes {
  char* data = nullptr;
  int64_t slot_stride = 0;  // from slot to slot
  int64_t slot_size = 0;
};

/// Letters as in core/kernels/ops. A negative slot skips the row.
struct CopySlotsArgs {
  int64_t N = 0;
  const int32_t* from = nullptr;  // [N]
  const int32_t* to = nullptr;    // [N]
  std::vector<PoolBytes> pools;
};

/// Work items: the rows of each pool.
int64_t num_work_items(const CopySlotsArgs& args);
void copy_slots(const CopySlotsArgs& args, int64_t begin_item, int64_t end_item);

}  // namespace xgdn::kernel::cpu
