// SPDX-License-Identifier: Apache-2.0
// Memory of the host in pieces larger than the tensors in it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <map>
#include <memory>
#include <utility>

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

  /// Frees what `take` gave, and joins it with its neighbours; returns its bytes. Asks for no memory, so that
  /// destructors may call it.
  size_t give_back(std::byte* block) noexcept;

  /// Gives chunks in which nothing is taken back to the system.
  void shrink();

  size_t count() const { return chunks_.size(); }
  size_t bytes() const;

 private:
  struct Chunk {
    at::Tensor memory;  // may be larger
    size_t bytes;
  };

  using Blocks = std::map<std::byte*, size_t>;  // sizes by begin

  // The one block of a new chunk.
  Blocks::iterator grow(size_t bytes);

  Pages pages_;
  Blocks free_;
  Blocks taken_;
  std::map<std::byte*, Chunk> chunks_;  // by begin
};

/// A tensor of the host from `begin` on, which holds `owner` as long as anybody has it. Its storage can be resized, as
/// those of other tensors, and leaves this memory then.
at::Tensor tensor_of(std::byte* begin, at::IntArrayRef sizes, const at::TensorOptions& options,
                     std::shared_ptr<const void> owner);

/// A tensor in `bytes` that `memory` lends: it points to what has take(bytes) and give_back(begin).
template <class Memory>
at::Tensor tensor_in(Memory memory, at::IntArrayRef sizes, const at::TensorOptions& options, size_t bytes) {
  struct Block {
    Block(Memory from, size_t size) : memory(std::move(from)), begin(memory->take(size)) {}
    ~Block() { memory->give_back(begin); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    const Memory memory;
    std::byte* const begin;
  };
  const auto block = std::make_shared<const Block>(std::move(memory), bytes);
  return tensor_of(block->begin, sizes, options, block);
}

/// Bytes of such a tensor, up to a multiple of 64.
size_t block_bytes(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace xgdn::kernel
