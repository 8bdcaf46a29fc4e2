// SPDX-License-Identifier: Apache-2.0
// The paged key and value cache of the full-attention layers. A block holds block_size tokens in every layer.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/errors.h"
#include "core/layers/attention_batch.h"
#include "core/runtime/leader.h"

namespace xgdn {

/// Shape and dtype of a cache.
struct KvCacheSpec {
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t block_size = 16;            // tokens
  at::ScalarType dtype = at::kFloat;  // of a row, which has kernel::kv_row_size elements

  /// Bytes of one block over all layers, keys and values.
  int64_t block_bytes() const;
};

/// Contents of blocks in host memory, on every rank of a model that several share.
class SavedBlocks {
 public:
  /// Tells the leader, unless null, when nobody wants them any more.
  SavedBlocks(std::vector<KvPool> layers, Leader* leader);
  ~SavedBlocks();
  SavedBlocks(const SavedBlocks&) = delete;
  SavedBlocks& operator=(const SavedBlocks&) = delete;

  const std::vector<KvPool>& layers() const { return layers_; }  // one entry a layer, this rank's heads
  int64_t id() const { return id_; }                             // by which other ranks know them

 private:
  std::vector<KvPool> layers_;
  Leader* leader_;
  int64_t id_;
};

/// Blocks with reference counts.
class KvCache {
 public:
  /// `leader`, unless null, tells other ranks of what is copied, saved and restored; it outlives the cache and what was
  /// saved of it. Throws RequestError for a negative number of blocks or an empty block.
  KvCache(const KvCacheSpec& spec, int64_t num_blocks, c10::Device device, Leader* leader = nullptr);

  /// `count` blocks with a reference count of one. Throws OutOfBlocks and takes none when fewer are free.
  std::vector<int32_t> allocate(int64_t count);
  /// One more holder of each block. Throws RangeError for a block that nobody holds.
  void share(const std::vector<int32_t>& blocks);
  /// One holder less of each block; the last one frees it. Throws RangeError for a block that nobody holds.
  void release(std::span<const int32_t> blocks);

  /// Throws RangeError for a block that nobody holds.
  int64_t ref_count(int32_t block) const { return held("ref_count", block); }

  /// Of each block's holders, `count` more (or less) keep it for later and would give it up. Throws RangeError for a
  /// block that nobody holds.
  void add_idle(const std::vector<int32_t>& blocks, int64_t count);
  /// Whether every holder of the block would give it up. Throws RangeError for a block that nobody holds.
  bool is_idle(int32_t block) const { return held("is_idle", block) == num_idle_[block]; }

  /// Copies the keys and values of one held block to another. Throws RangeError for a block that nobody holds.
  void copy(int32_t from, int32_t to);

  /// The contents of held blocks in host memory. Throws RangeError for a block that nobody holds.
  std::shared_ptr<const SavedBlocks> save(const std::vector<int32_t>& blocks);
  /// Writes rows of saved contents to held blocks, one to each. Throws RangeError as save, and for another number of
  /// rows.
  void restore(const SavedBlocks& saved, const std::vector<int64_t>& rows, const std::vector<int32_t>& blocks);

  /// Blocks that `tokens` tokens need; 0 for a model without full attention.
  int64_t blocks_for(int64_t tokens) const;

  int64_t block_size() const { return spec_.block_size; }                          // tokens
  int64_t num_blocks() const { return static_cast<int64_t>(ref_counts_.size()); }  // held and free
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }          // held by nobody
  int64_t num_idle() const { return num_all_idle_; }                               // whose holders would give them up
  int64_t block_bytes() const { return spec_.block_bytes(); }                      // of one block
  int64_t bytes() const { return num_blocks() * block_bytes(); }                   // of all blocks
  std::vector<KvPool>& layers() { return layers_; }                                // the pools, in layer order

 private:
  int64_t held(const char* what, int32_t block) const;  // the reference count of a block that somebody holds

  void change(const char* what, int32_t block, int64_t holders, int64_t idle);

  KvCacheSpec spec_;
  Leader* leader_;
  std::vector<KvPool> layers_;
  std::vector<int64_t> ref_counts_;
  std::vector<int64_t> num_idle_;  // of these holders, those that would give the block up
  int64_t num_all_idle_ = 0;       // blocks
  std::vector<int32_t> free_;      // the next one is at the back
};

}  // namespace xgdn
