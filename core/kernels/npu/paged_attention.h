// SPDX-License-Identifier: Apache-2.0
// Attention over the paged cache with torch_npu's fused op: one gather of all contexts' keys, one of their values, one
// launch for all sequences, decode and prefill alike.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "core/kernels/backend.h"

namespace xgdn::kernel::npu {

/// [2048, 2048] bool, true above the diagonal: what the op wants for a causal call of any lengths. Made once per
/// device.
at::Tensor causal_mask(c10::Device device);

/// nullopt: a cache of that dtype is served; else a sentence.
std::optional<std::string> why_not_cache(at::ScalarType tokens, at::ScalarType cache);

/// nullopt: the op's documented limits hold; else a sentence.
std::optional<std::string> why_not_attention(const PagedAttentionParams& p, const AttentionShape& s);

void run_attention(const PagedAttentionParams& p, const AttentionShape& s);

}  // namespace xgdn::kernel::npu
