// SPDX-License-Identifier: Apache-2.0
// The ops of the gated delta rule and of the models around it. The only header of core/kernels that other levels
// include.
//
//   alpha = exp(g)    u = beta (v - alpha S k)    S <- alpha S + u k^T    o = scale S q        (S: [V, K])
//
// ops/contract.h says what the letters mean and what every op promises.
#pragma once

#include "core/kernels/allocation.h"
#include "core/kernels/backend_choice.h"
#include "core/kernels/chunk_metadata.h"
#include "core/kernels/device.h"
#include "core/kernels/op_profile.h"
#include "core/kernels/ops/attention.h"
#include "core/kernels/ops/causal_conv1d.h"
#include "core/kernels/ops/contract.h"
#include "core/kernels/ops/delta_rule.h"
#include "core/kernels/ops/linear.h"
#include "core/kernels/ops/logits.h"
#include "core/kernels/ops/moe.h"
#include "core/kernels/ops/norm.h"
#include "core/kernels/ops/quantized_weight.h"
#include "core/kernels/ops/replay.h"
#include "core/kernels/ops/state.h"
#include "core/kernels/step_memory.h"
