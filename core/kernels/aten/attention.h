// SPDX-License-Identifier: Apache-2.0
// Attention composed from ATen, one sequence after the other, which is right where a launch costs nothing; and, for any
// device, what writes its cache.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/kernels/op_list.h"

namespace xgdn::kernel::aten {

void attend_one_by_one(const PagedAttentionParams& p);

/// Tokens [T, HKV, D] as the rows [T, HKV, R] of a cache of that dtype.
at::Tensor cache_rows(const at::Tensor& tokens, at::ScalarType cache_dtype);

/// Where the dtype of the cache is that of the tokens, three launches if the caller promises that there is no padding.
void store_kv(const StoreKvParams& p);

}  // namespace xgdn::kernel::aten
