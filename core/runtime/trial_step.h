// SPDX-License-Identifier: Apache-2.0
// Whether the backends can run a model at all, asked before its weights are read.
#pragma once

#include "core/models/hybrid_decoder.h"

namespace xgdn {

/// Runs a prefill and a decode step of a small decoder with the heads, the convolution, the experts and the kinds of
/// layers of `config`, so that every op is asked on the device itself. Throws UnsupportedError with the op's own
/// sentence when no backend can serve one.
void try_step(const ModelConfig& config, const DecoderOptions& options);

}  // namespace xgdn
