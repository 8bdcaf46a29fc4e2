// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/allocation.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstddef>
#include <mutex>

#include "core/kernels/memory_chunks.h"

namespace xgdn::kernel {
namespace {

// Of all pools and weights of the host. A layer's are a few MB or less, and most of such memory would lie in small
// pages if the system were asked for each. What a tensor leaves goes to the next one, or with the last of its chunk
// back to the system.
class LastingMemory {
 public:
  std::byte* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    return chunks_.take(bytes, std::max(bytes, std::clamp(chunks_.bytes() / 8, kLeast, kMost)));
  }

  void give_back(std::byte* begin) {
    const std::lock_guard lock(mutex_);
    chunks_.give_back(begin);
    chunks_.shrink();
  }

 private:
  static constexpr size_t kLeast = 2 << 20, kMost = 64 << 20;  // of a chunk for several tensors

  std::mutex mutex_;  // any thread may load, and free a tensor
  MemoryChunks chunks_{MemoryChunks::Pages::kWhole};
};

}  // namespace

at::Tensor allocate_pool(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return allocate_weight(sizes, options).zero_();
}

at::Tensor allocate_weight(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static auto* const memory = new LastingMemory;  // tensors may outlive whatever is destroyed at exit
  const size_t bytes = block_bytes(sizes, options);
  if (!options.device().is_cpu() || bytes == 0) return at::empty(sizes, options);
  return tensor_in(memory, sizes, options, bytes);
}

}  // namespace xgdn::kernel
