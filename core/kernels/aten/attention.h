// SPDX-License-Identifier: Apache-2.0
// Attention composed from ATen, one sequence after the other, which is right where a launch costs nothing; and, for any
// device, what writes its cache.
#pragma once

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void attend_one_by_one(const PagedAttentionParams& p);

/// Three launches where the caller promises that there is no padding.
void store_kv(const StoreKvParams& p);

}  // namespace xgdn::kernel::aten
