// SPDX-License-Identifier: Apache-2.0
// One sequence through a decoder by itself, over pools that last as long as the call.
#pragma once

#include <cstdint>
#include <vector>

#include "core/models/hybrid_decoder.h"

namespace xgdn {

/// Logits [T, vocab] f32 of every token of the prompt, which is computed in one pass, and of what follows it, each
/// token in a decode step. Throws as BatchBuilder::build for an empty prompt and for tokens outside the vocabulary.
at::Tensor sequence_logits(const HybridDecoder& model, const std::vector<int32_t>& prompt,
                           const std::vector<int32_t>& continuation = {});

}  // namespace xgdn
