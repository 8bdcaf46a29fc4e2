// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/kv_cache.h"

#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <utility>

#include "core/kernels/ops_api.h"
#include "core/runtime/pool_contents.h"

namespace xgdn {
namespace {

void check_at_least(const char* name, int64_t least, int64_t got) {
  if (got < least) throw RequestError(c10::str("[KvCache] ", name, ": expected at least ", least, ", got ", got));
}

size_t checked_num_blocks(int64_t num_blocks) {
  check_at_least("num_blocks", 0, num_blocks);
  if (num_blocks > kernel::kMaxIndex) {
    throw RequestError(c10::str("[KvCache] num_blocks: expected at most ", kernel::kMaxIndex, ", got ", num_blocks));
  }
  return static_cast<size_t>(num_blocks);
}

}  // namespace

int64_t KvCacheSpec::block_bytes() const {
  const int64_t row = kernel::kv_row_size(head_dim, dtype) * static_cast<int64_t>(c10::elementSize(dtype));
  return 2 * num_layers * block_size * num_kv_heads * row;
}

SavedBlocks::SavedBlocks(std::vector<KvPool> layers, Leader* leader)
    : layers_(std::move(layers)), leader_(leader), id_(leader == nullptr ? 0 : leader->next_id()) {}

SavedBlocks::~SavedBlocks() {
  if (leader_ != nullptr) leader_->tell(DropBlocksCommand{id_});
}

KvCache::KvCache(const KvCacheSpec& spec, int64_t num_blocks, c10::Device device, Leader* leader)
    : spec_(spec), leader_(leader), ref_counts_(checked_num_blocks(num_blocks), 0), num_idle_(ref_counts_.size(), 0) {
  check_at_least("block_size", 1, spec.block_size);
  if (num_blocks > 0 && spec.block_size > kernel::kMaxIndex / num_blocks) {
    throw RequestError(c10::str("[KvCache] num_blocks: expected at most ", kernel::kMaxIndex / spec.block_size,
                                " blocks of ", spec.block_size, " tokens, got ", num_blocks));
  }
  const at::TensorOptions options = at::TensorOptions().dtype(spec.dtype).device(device);
  const std::vector<int64_t> shape{num_blocks, spec.block_size, spec.num_kv_heads,
                                   kernel::kv_row_size(spec.head_dim, spec.dtype)};
  for (int64_t i = 0; i < spec.num_layers; ++i)
    layers_.push_back({at::zeros(shape, options), at::zeros(shape, options)});
  for (int64_t block = num_blocks; block-- > 0;) free_.push_back(static_cast<int32_t>(block));
}

int64_t KvCache::blocks_for(int64_t tokens) const {
  return spec_.num_layers == 0 ? 0 : (tokens + spec_.block_size - 1) / spec_.block_size;
}

std::vector<int32_t> KvCache::allocate(int64_t count) {
  check_at_least("count", 0, count);
  if (count > num_free()) {
    throw OutOfBlocks(c10::str("[KvCache] expected ", count, " free blocks, got ", num_free(), " of ", num_blocks()));
  }
  std::vector<int32_t> blocks(free_.end() - count, free_.end());
  free_.resize(free_.size() - static_cast<size_t>(count));
  for (int32_t block : blocks) ref_counts_[block] = 1;
  return blocks;
}

int64_t KvCache::held(const char* what, int32_t block) const {
  if (block >= 0 && block < num_blocks() && ref_counts_[block] > 0) return ref_counts_[block];
  throw RangeError(c10::str("[KvCache] ", what, ": expected a held block, got ", block));
}

void KvCache::change(const char* what, int32_t block, int64_t holders, int64_t idle) {
  held(what, block);
  const auto is_all_idle = [&] { return num_idle_[block] > 0 && num_idle_[block] == ref_counts_[block]; };
  num_all_idle_ -= is_all_idle();
  ref_counts_[block] += holders;
  num_idle_[block] += idle;
  num_all_idle_ += is_all_idle();
  if (ref_counts_[block] == 0) free_.push_back(block);
}

void KvCache::share(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) change("share", block, 1, 0);
}

void KvCache::release(std::span<const int32_t> blocks) {
  for (int32_t block : blocks) change("release", block, -1, 0);
}

void KvCache::add_idle(const std::vector<int32_t>& blocks, int64_t count) {
  for (int32_t block : blocks) change("add_idle", block, 0, count);
}

std::shared_ptr<const SavedBlocks> KvCache::save(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) held("save", block);
  auto saved = std::make_shared<const SavedBlocks>(save_blocks(layers_, blocks), leader_);
  if (leader_ != nullptr) leader_->tell(SaveBlocksCommand{saved->id(), blocks});
  return saved;
}

void KvCache::restore(const SavedBlocks& saved, const std::vector<int64_t>& rows, const std::vector<int32_t>& blocks) {
  if (rows.size() != blocks.size()) {
    throw RangeError(c10::str("[KvCache] restore: expected ", rows.size(), " blocks, got ", blocks.size()));
  }
  for (int32_t block : blocks) held("restore", block);
  if (leader_ != nullptr) leader_->tell(RestoreBlocksCommand{saved.id(), rows, blocks});
  restore_blocks(layers_, saved.layers(), rows, blocks);
}

void KvCache::copy(int32_t from, int32_t to) {
  held("copy", from);
  held("copy", to);
  if (leader_ != nullptr) leader_->tell(CopyBlockCommand{from, to});
  copy_block(layers_, from, to);
}

}  // namespace xgdn
