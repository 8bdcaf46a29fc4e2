// SPDX-License-Identifier: Apache-2.0
// The checks of every op: dtypes, shapes, devices and strides, once, before a backend is selected.
#pragma once

#include "core/kernels/backend.h"

namespace xgdn::kernel {

/// The call's sizes; throws what ops_api.h names. check() is the same without the sizes, also for symbolic tensors.
GdnShape checked_shape(const RecurrentGatedDeltaRuleParams& p);
GdnShape checked_shape(const ChunkGatedDeltaRuleParams& p);
GdnShape checked_shape(const PackedDecodeParams& p);
ConvShape checked_shape(const CausalConv1dParams& p);
ConvShape checked_shape(const CausalConv1dUpdateParams& p);
GdnShape checked_shape(const GdnGatingParams& p);
GdnShape checked_shape(const L2NormParams& p);
GdnShape checked_shape(const RmsNormGatedParams& p);
DecodeStepShape checked_shape(const GdnDecodeStepParams& p);
AttentionShape checked_shape(const PagedAttentionParams& p);
NormShape checked_shape(const RmsNormParams& p);
LinearShape checked_shape(const SiluAndMulParams& p);
LinearShape checked_shape(const LinearParams& p);
ExpertsShape checked_shape(const MoeExpertsParams& p);

}  // namespace xgdn::kernel
