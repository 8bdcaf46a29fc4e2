// SPDX-License-Identifier: Apache-2.0
// Memory for what a step computes on the host, kept from one step to the next.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace xgdn::kernel {

/// Memory of the temporaries of one step after the other. Steps of like tensors find theirs where it was: pages are
/// made once and not in every step, as those of large tensors from the system's allocator are. Grows to what the
/// largest step holds at once. When it ends, what no tensor lies in goes back to the system, the rest with the tensors.
class StepMemory {
 public:
  StepMemory();
  ~StepMemory();

  /// Lends a memory to the temporaries of the calling thread for as long as it lives.
  class Use {
   public:
    explicit Use(StepMemory& memory);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    StepMemory* before_;
  };

  /// Taken from the system, free or not.
  int64_t bytes() const;

  StepMemory(const StepMemory&) = delete;
  StepMemory& operator=(const StepMemory&) = delete;

 private:
  friend at::Tensor allocate_temporary(at::IntArrayRef sizes, const at::TensorOptions& options);
  class Blocks;

  std::shared_ptr<Blocks> blocks_;  // which tensors own, too: one may outlive the step, and whoever ran it
};

/// Allocates uninitialised memory for what a step computes: on the host of the calling thread's StepMemory, elsewhere
/// and without one as at::empty.
at::Tensor allocate_temporary(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace xgdn::kernel
