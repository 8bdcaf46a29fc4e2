// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/step_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "core/kernels/allocation.h"

namespace xgdn::kernel {
namespace {

constexpr size_t kAlignment = 64;  // of tensors

// Of the calling thread.
thread_local constinit StepMemory* in_use = nullptr;

size_t aligned(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

// Chunks from the system and the free blocks in them. The smallest that suffices is taken, of equal ones the lowest: like
// steps find their tensors where they were, and small ones lie side by side.
//
// What does not fit gets a chunk of its own. Once nothing is taken, chunks become one, as large as what was ever taken at
// once; where that did not suffice for lack of a large block, as large as what did.
class StepMemory::Blocks {
 public:
  std::byte* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto block = free_.end();
    for (auto other = free_.begin(); other != free_.end(); ++other) {
      if (other->second >= bytes && (block == free_.end() || other->second < block->second)) block = other;
    }
    if (block == free_.end()) block = grow(bytes);
    const auto [begin, size] = *block;
    free_.erase(block);
    if (size > bytes) free_.emplace(begin + bytes, size - bytes);
    taken_ += bytes;
    most_taken_ = std::max(most_taken_, taken_);
    return begin;
  }

  void give_back(std::byte* begin, size_t bytes) {
    const std::lock_guard lock(mutex_);
    merge(free_.emplace(begin, bytes).first);
    taken_ -= bytes;
    if (taken_ > 0 || chunks_.size() == 1) return;
    wanted_ = chunks_.front().nbytes() < most_taken_ ? most_taken_ : held();
    free_.clear();
    chunks_.clear();
  }

  size_t bytes() const {
    const std::lock_guard lock(mutex_);
    return held();
  }

 private:
  using Free = std::map<std::byte*, size_t>;

  static std::byte* begin_of(const at::Tensor& chunk) { return static_cast<std::byte*>(chunk.mutable_data_ptr()); }

  size_t held() const {
    return std::transform_reduce(chunks_.begin(), chunks_.end(), size_t{0}, std::plus<>(),
                                 [](const at::Tensor& chunk) { return chunk.nbytes(); });
  }

  Free::iterator grow(size_t bytes) {
    const size_t size = std::max(bytes, std::exchange(wanted_, 0));
    chunks_.push_back(allocate_weight({static_cast<int64_t>(size)}, at::kByte));
    return free_.emplace(begin_of(chunks_.back()), size).first;
  }

  // Joins a free block with its neighbours in its chunk.
  void merge(Free::iterator block) {
    if (block != free_.begin() && touches(*std::prev(block), block->first)) {
      const auto before = std::prev(block);
      before->second += block->second;
      free_.erase(block);
      block = before;
    }
    if (const auto next = std::next(block); next != free_.end() && touches(*block, next->first)) {
      block->second += next->second;
      free_.erase(next);
    }
  }

  bool touches(const Free::value_type& block, const std::byte* next) const {
    return block.first + block.second == next &&
           std::ranges::none_of(chunks_, [&](const at::Tensor& chunk) { return begin_of(chunk) == next; });
  }

  mutable std::mutex mutex_;  // any thread may free a tensor
  Free free_;
  std::vector<at::Tensor> chunks_;
  size_t taken_ = 0;  // bytes
  size_t most_taken_ = 0;
  size_t wanted_ = 0;  // of the next chunk
};

StepMemory::StepMemory() : blocks_(std::make_shared<Blocks>()) {}

StepMemory::~StepMemory() = default;

int64_t StepMemory::bytes() const {
  return static_cast<int64_t>(blocks_->bytes());
}

StepMemory::Use::Use(StepMemory& memory) : before_(std::exchange(in_use, &memory)) {}

StepMemory::Use::~Use() {
  in_use = before_;
}

// What a tensor holds.
struct StepMemory::Lease {
  Lease(std::shared_ptr<Blocks> of, size_t size) : blocks(std::move(of)), bytes(size), begin(blocks->take(bytes)) {}
  ~Lease() { blocks->give_back(begin, bytes); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  std::shared_ptr<Blocks> blocks;
  size_t bytes;
  std::byte* begin;
};

at::Tensor allocate_temporary(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = aligned(static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize());
  if (in_use == nullptr || !options.device().is_cpu() || bytes == 0) return at::empty(sizes, options);
  auto lease = std::make_unique<StepMemory::Lease>(in_use->blocks_, bytes);
  std::byte* begin = lease->begin;
  const auto give_back = [](void* context) { delete static_cast<StepMemory::Lease*>(context); };
  return at::for_blob(begin, sizes).context(lease.release(), give_back).options(options).make_tensor();
}

}  // namespace xgdn::kernel
