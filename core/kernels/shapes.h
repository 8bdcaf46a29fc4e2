// SPDX-License-Identifier: Apache-2.0
// Sizes of a call, taken from its checked tensors: all code behind the checks takes sizes from here.
#pragma once

#include <cstdint>

namespace xgdn::kernel {

/// Sizes of a delta-rule call.
struct GdnShape {
  int64_t T = 0;   // tokens
  int64_t N = 0;   // sequences
  int64_t S = 0;   // slots
  int64_t H = 0;   // key heads
  int64_t HV = 0;  // value heads
  int64_t K = 0;   // key head dim
  int64_t V = 0;   // value head dim
  int64_t L = 1;   // columns of the slot table
};

/// Sizes of a call on replay states.
struct ReplayShape {
  GdnShape rule;
  int64_t B = 0;  // slots of rings
  int64_t R = 0;  // rows of a ring
};

/// Sizes of a convolution call.
struct ConvShape {
  int64_t T = 0;  // tokens
  int64_t N = 0;  // sequences
  int64_t S = 0;  // slots
  int64_t D = 0;  // channels
  int64_t W = 0;  // taps
  int64_t R = 0;  // rows of a conv slot
};

/// Sizes of a decode step: of the delta rule and of the convolution before it.
struct DecodeStepShape {
  GdnShape rule;
  ConvShape conv;
  int64_t B = 0;  // slots of rings; 0: plain states
  int64_t R = 0;  // rows of a ring
};

/// Sizes of a norm over the last dimension, or of a gate of heads.
struct NormShape {
  int64_t T = 0;  // tokens
  int64_t H = 0;  // heads
  int64_t D = 0;  // head dim
};

/// Sizes of a product with weights, or of what stands between two.
struct LinearShape {
  int64_t T = 0;  // tokens
  int64_t D = 0;  // width of the input; 0 where there is no product
  int64_t O = 0;  // width of the output
};

/// Sizes of a product with a weight in 8 or 4 bits.
struct QuantizedLinearShape {
  int64_t T = 0;           // tokens
  int64_t D = 0;           // width of the input
  int64_t O = 0;           // width of the output
  int64_t group_size = 0;  // elements of a row that share a scale
};

/// Sizes of an attention call.
struct AttentionShape {
  int64_t T = 0;    // tokens
  int64_t N = 0;    // sequences
  int64_t HQ = 0;   // query heads
  int64_t HKV = 0;  // key heads
  int64_t D = 0;    // head dim
};

/// Sizes of what tokens write to a paged cache.
struct KvShape {
  int64_t T = 0;    // tokens
  int64_t P = 0;    // blocks
  int64_t B = 0;    // rows of a block
  int64_t HKV = 0;  // key heads
  int64_t D = 0;    // head dim
};

/// Sizes of a call on slots of pools.
struct SlotsShape {
  int64_t N = 0;  // rows
  int64_t S = 0;  // slots; 0 where there are no pools
};

/// Sizes of a call of a mixture of experts.
struct ExpertsShape {
  int64_t T = 0;  // tokens
  int64_t A = 0;  // experts of a token
  int64_t E = 0;  // experts
  int64_t D = 0;  // width of a token
  int64_t I = 0;  // width of an expert
};

/// Sizes of a call of a mixture of experts with weights in 8 or 4 bits.
struct QuantizedExpertsShape {
  ExpertsShape experts;
  int64_t gate_up_group_size = 0;
  int64_t down_group_size = 0;
};

}  // namespace xgdn::kernel
