// SPDX-License-Identifier: Apache-2.0
// Memory of the host in pieces larger than the tensors in it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <functional>
#include <map>

namespace xgdn::kernel {

/// Chunks from the system, in huge pages where it offers them, and the free blocks in them. One thread at a time.
class MemoryChunks {
 public:
  /// Chunks are whole huge pages, for which up to one more is asked for and never touched, or as large as asked for.
  enum class Pages { kWhole, kAsTheyLie };

  explicit MemoryChunks(Pages pages) : pages_(pages) {}

  /// Takes the smallest free block that suffices, of equal ones the lowest, or one of a new chunk of `chunk_bytes`,
  /// which are `bytes` or more. Blocks begin at multiples of 64 bytes if `bytes` is one in every call.
  std::byte* take(size_t bytes, size_t chunk_bytes);

  /// Frees what `take` gave, and joins it with its neighbours.
  void give_back(std::byte* block, size_t bytes);

  /// Gives chunks in which nothing is taken back to the system.
  void shrink();

  size_t count() const { return chunks_.size(); }
  size_t bytes() const;

 private:
  struct Chunk {
    at::Tensor memory;  // may be larger
    size_t bytes;
  };

  using Free = std::map<std::byte*, size_t>;  // sizes by begin

  // The one block of a new chunk.
  Free::iterator grow(size_t bytes);

  Pages pages_;
  Free free_;
  std::map<std::byte*, Chunk> chunks_;  // by begin
};

/// A tensor of the host from `begin` on, which calls `give_back` when nobody has it any more. Its storage can be
/// resized, as those of other tensors, and leaves this memory then.
at::Tensor tensor_of(std::byte* begin, at::IntArrayRef sizes, const at::TensorOptions& options,
                     std::function<void()> give_back);

/// Bytes of such a tensor, up to a multiple of 64.
size_t block_bytes(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace xgdn::kernel
