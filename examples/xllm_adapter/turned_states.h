// SPDX-License-Identifier: Apache-2.0
// States out of a pool that stores them as [K, V], for kernels that work on [V, K].
#pragma once

#include <ATen/core/Tensor.h>

namespace xllm::kernel::gdn {

/// The named slots of a pool, turned and in their order. The pool gets them back by write_back(); slots that are not
/// named keep their bits. A slot below 0 is padding.
class TurnedStates {
 public:
  /// pool [S, HV, K, V], slots [M]; no slot is named twice.
  TurnedStates(const at::Tensor& pool, const at::Tensor& slots);

  const at::Tensor& states() const { return states_; }    // [M, HV, V, K]
  const at::Tensor& indices() const { return indices_; }  // [M] i32: m, or kPadSlot

  void write_back() const;

 private:
  at::Tensor pool_, slots_, is_slot_, states_, indices_;
};

/// The last two dimensions exchanged, in memory of its own.
at::Tensor turned(const at::Tensor& states);

}  // namespace xllm::kernel::gdn
