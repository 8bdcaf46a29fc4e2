// SPDX-License-Identifier: Apache-2.0
// Attention composed from ATen, one sequence after the other, which is right where a launch costs nothing; and, for any
// device, what writes its cache.
#pragma once

#include <cstdint>

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

/// The sequences with more than so many tokens.
void attend_one_by_one(const PagedAttentionParams& p, int64_t more_than);

/// Three launches where the caller promises that there is no padding.
void store_kv(const StoreKvParams& p);

}  // namespace xgdn::kernel::aten
