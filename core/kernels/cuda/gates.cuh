// SPDX-License-Identifier: Apache-2.0
// Gates of the delta rule and of the norm after it, as device code.
#pragma once

#include "core/kernels/cuda/rows.cuh"
#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

__device__ inline float silu(float x) {
  return x * sigmoid(x);
}

/// The natural logarithm of the decay: -exp(A_log) softplus(a + dt_bias). log1p keeps what a small exponential says.
__device__ inline float log_decay(float a, float A_log, float dt_bias) {
  const float x = a + dt_bias;
  const float softplus = x > 20.0f ? x : log1pf(expf(x));
  return -expf(A_log) * softplus;
}

/// The decay of one token. Near one the step adds S expm1(g), and S is rounded once: rounding the decay, or S after it,
/// would bias every step of a slow decay the same way.
struct Decay {
  float factor;
  float kept;  // of S beside factor S: 1 near one, else 0

  Decay() = default;
  __device__ explicit Decay(float g) {
    const bool is_near_one = g > -0.5f;
    factor = is_near_one ? expm1f(g) : expf(g);
    kept = is_near_one ? 1.0f : 0.0f;
  }
  __device__ float of(float x) const { return fmaf(factor, x, kept * x); }
};

/// The gates of a token and head, on their way.
struct RawGates {
  RawScalar g, beta, A_log, dt_bias;

  __device__ void load(const TokenDeltaRuleArgs& a, int64_t token, int64_t head) {
    g.load(a.g.dtype, row_of(a.g, token, head), 0);
    beta.load(a.beta.dtype, row_of(a.beta, token, head), 0);
    if (a.A_log.data == nullptr) return;
    A_log.load(a.A_log.dtype, a.A_log.data, head);
    dt_bias.load(a.dt_bias.dtype, a.dt_bias.data, head);
  }
  __device__ Decay decay(const TokenDeltaRuleArgs& a) const {
    const float x = g.widened(a.g.dtype);
    if (a.A_log.data == nullptr) return Decay(x);
    return Decay(log_decay(x, A_log.widened(a.A_log.dtype), dt_bias.widened(a.dt_bias.dtype)));
  }
  __device__ float write_strength(const TokenDeltaRuleArgs& a) const {
    const float x = beta.widened(a.beta.dtype);
    return a.A_log.data == nullptr ? x : sigmoid(x);
  }
};

}  // namespace xgdn::kernel::cuda
