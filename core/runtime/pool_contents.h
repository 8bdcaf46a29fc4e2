// SPDX-License-Identifier: Apache-2.0
// What the pools hold, by the pools' own indices: copies of it, whoever owns the slots and blocks.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/layers/attention_batch.h"
#include "core/layers/gdn_state.h"

namespace xgdn {

/// Copies a group's components of one slot to another, in all layers.
void copy_slot(const std::vector<GdnState>& layers, SlotGroup group, int32_t from, int32_t to);
/// What a freed slot is filled with.
enum class SlotFill {
  kZeros,
  kPoison,  // NaN, integers the largest
};
/// Fills a group's components of a slot, in all layers.
void fill_slot(const std::vector<GdnState>& layers, SlotGroup group, int32_t slot, SlotFill fill);

/// Takes the first num_accepted, at least 1, of the tokens that a verification has left in a slot of replay states:
/// they count as those of the ring, which has room for them, and no others are left.
void commit_drafts(const std::vector<GdnState>& layers, int32_t slot, int64_t num_accepted);

/// Copies the keys and values of one block to another, in all layers.
void copy_block(const std::vector<KvPool>& layers, int32_t from, int32_t to);
/// The contents of blocks in host memory, one entry a layer.
std::vector<KvPool> save_blocks(const std::vector<KvPool>& layers, const std::vector<int32_t>& blocks);
/// Writes rows of saved contents to blocks, one to each.
void restore_blocks(const std::vector<KvPool>& layers, const std::vector<KvPool>& saved,
                    const std::vector<int64_t>& rows, const std::vector<int32_t>& blocks);

/// A state and the keys and values of its tokens, on the host.
struct SavedMemory {
  std::vector<std::vector<at::Tensor>> states;  // of each GDN layer, the components of one slot
  std::vector<KvPool> kv;                       // of each attention layer, [T, Hkv, row]
};

/// Where a sequence's state lies, and its keys and values.
struct MemoryPlace {
  std::array<int32_t, kSlotGroups.size()> slots = {};  // by SlotGroup
  std::vector<int32_t> blocks;                         // in the order of the tokens
  int64_t num_tokens = 0;                              // T
};

/// A copy of what lies there.
SavedMemory save_memory(const std::vector<GdnState>& states, const std::vector<KvPool>& kv, const MemoryPlace& place);
/// Puts such a copy there.
void load_memory(const std::vector<GdnState>& states, const std::vector<KvPool>& kv, const MemoryPlace& place,
                 const SavedMemory& saved);

}  // namespace xgdn
