// SPDX-License-Identifier: Apache-2.0
// How the products of few tokens add, all of them alike: a sum over D is that of its classes in order; a class has
// every 8th or 16th piece of 32 and adds them in order, first and second halves of lanes' packets apart. So a token's
// bits depend on neither the kernel nor the tokens beside it.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/packets.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kPiece = 32;  // of D
inline constexpr int kPacketsOfPiece = kPiece / kPacket;
inline constexpr int kTile = 8;  // outputs, or tokens, of a fragment
inline constexpr int kFewClasses = 8;
inline constexpr int kManyClasses = 16;
inline constexpr int kMostOfFewClasses = 1024;  // of D

}  // namespace xgdn::kernel::cuda
