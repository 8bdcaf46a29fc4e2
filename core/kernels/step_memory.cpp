// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/step_memory.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <utility>

#include "core/kernels/memory_chunks.h"

namespace xgdn::kernel {
namespace {

// Of the calling thread.
thread_local constinit StepMemory* in_use = nullptr;

}  // namespace

// Like steps find their tensors where they were, and small ones lie side by side.
//
// What does not fit gets a chunk of its own. Once nothing is taken, chunks become one, as large as what was ever taken
// at once; where that did not suffice for lack of a large block, as large as what did.
class StepMemory::Blocks {
 public:
  std::byte* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    std::byte* const begin = chunks_.take(bytes, std::max(bytes, std::exchange(wanted_, 0)));
    if (chunks_.count() == 1) first_ = chunks_.bytes();
    taken_ += bytes;
    most_taken_ = std::max(most_taken_, taken_);
    return begin;
  }

  void give_back(std::byte* begin) {
    const std::lock_guard lock(mutex_);
    taken_ -= chunks_.give_back(begin);
    if (has_ended_) return chunks_.shrink();
    if (taken_ > 0 || chunks_.count() == 1) return;
    wanted_ = first_ < most_taken_ ? most_taken_ : chunks_.bytes();
    chunks_.shrink();
  }

  // Nothing more will be taken.
  void end() {
    const std::lock_guard lock(mutex_);
    has_ended_ = true;
    chunks_.shrink();
  }

  size_t bytes() const {
    const std::lock_guard lock(mutex_);
    return chunks_.bytes();
  }

 private:
  mutable std::mutex mutex_;  // any thread may free a tensor
  MemoryChunks chunks_{MemoryChunks::Pages::kAsTheyLie};
  size_t taken_ = 0;  // bytes
  size_t most_taken_ = 0;
  size_t first_ = 0;   // of the chunks there are
  size_t wanted_ = 0;  // of the next one, if there is none
  bool has_ended_ = false;
};

StepMemory::StepMemory() : blocks_(std::make_shared<Blocks>()) {}

StepMemory::~StepMemory() {
  blocks_->end();
}

int64_t StepMemory::bytes() const {
  return static_cast<int64_t>(blocks_->bytes());
}

StepMemory::Use::Use(StepMemory& memory) : before_(std::exchange(in_use, &memory)) {}

StepMemory::Use::~Use() {
  in_use = before_;
}

at::Tensor allocate_temporary(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = block_bytes(sizes, options);
  if (in_use == nullptr || !options.device().is_cpu() || bytes == 0) return at::empty(sizes, options);
  return tensor_in(in_use->blocks_, sizes, options, bytes);
}

}  // namespace xgdn::kernel
