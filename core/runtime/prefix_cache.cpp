// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/prefix_cache.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include "core/kernels/ops_api.h"
#include "core/models/hash_bytes.h"

namespace xgdn {
namespace {

constexpr int64_t kShortChunk = 16;  // tokens, where states are kept after any

// Tokens of a prompt whose whole chunks are a piece of their own, so that the state after them can be kept. What is
// left of the prompt takes a step more, which a shorter one is not worth.
constexpr int64_t kLeastPiece = 4 * kernel::kChunkSize;

}  // namespace

PrefixCache::PrefixCache(int64_t num_slots, StatePool& states, KvCache& kv)
    : num_slots_(num_slots),
      has_replay_states_(states.has_replay_states()),
      chunk_(has_replay_states_ ? kShortChunk : kernel::kChunkSize),
      states_(states),
      kv_(kv) {}

std::vector<uint64_t> PrefixCache::hashes_of(std::span<const int32_t> tokens) const {
  const auto chunk = static_cast<size_t>(chunk_);
  std::vector<uint64_t> hashes;
  for (uint64_t hash = 0; tokens.size() >= chunk; tokens = tokens.subspan(chunk)) {
    hash = hash_bytes(hash, {reinterpret_cast<const char*>(tokens.data()), chunk * sizeof(int32_t)});
    hashes.push_back(hash);
  }
  return hashes;
}

PrefixCache::Prefix* PrefixCache::find(std::span<const int32_t> prompt) {
  return longest(prompt.first(prompt.size() - 1));
}

PrefixCache::Prefix* PrefixCache::longest(std::span<const int32_t> tokens) {
  if (prefixes_.empty()) return nullptr;
  const std::vector<uint64_t> hashes = hashes_of(tokens);
  Prefix* longest = nullptr;
  for (auto hash = hashes.rbegin(); hash != hashes.rend() && longest == nullptr; ++hash) {
    const auto [begin, end] = by_chunks_.equal_range(*hash);
    for (auto it = begin; it != end; ++it) {
      Prefix& prefix = *it->second;
      if (prefix.tokens.size() > tokens.size()) continue;
      if (longest != nullptr && prefix.tokens.size() <= longest->tokens.size()) continue;
      if (std::equal(prefix.tokens.begin(), prefix.tokens.end(), tokens.begin())) longest = &prefix;
    }
  }
  return longest;
}

void PrefixCache::use(Prefix* prefix, std::span<const int32_t> prompt, SequenceMemory& memory) {
  stats_.num_looked_up += std::ssize(prompt);
  if (prefix == nullptr) return;
  prefix->memory.fork(memory);
  stats_.num_found += std::ssize(prefix->tokens);
  prefix->is_shared = true;
  prefixes_.splice(prefixes_.end(), prefixes_, find_equal(prefix->tokens, prefix->hashes.back()));
}

std::vector<int64_t> PrefixCache::checkpoints(std::span<const int32_t> prompt, int64_t num_computed) const {
  if (num_slots_ == 0) return {};
  const std::vector<uint64_t> hashes = hashes_of(prompt);
  auto num_shared = std::ssize(hashes);
  const auto is_held = [&](int64_t count) { return num_beginning_with_.contains(hashes[count - 1]); };
  while (num_shared > 0 && (num_shared * chunk_ >= std::ssize(prompt) || !is_held(num_shared))) --num_shared;
  int64_t end = has_replay_states_ ? std::ssize(prompt) : std::ssize(hashes) * chunk_;
  if (!has_replay_states_ && end < std::ssize(prompt) && end < kLeastPiece) end = 0;
  std::vector<int64_t> checkpoints;
  for (const int64_t position : {num_shared * chunk_, end}) {
    const int64_t last = checkpoints.empty() ? num_computed : checkpoints.back();
    if (position > last && position >= chunk_) checkpoints.push_back(position);
  }
  return checkpoints;
}

PrefixCache::Prefixes::iterator PrefixCache::find_equal(std::span<const int32_t> tokens, uint64_t hash) {
  const auto [begin, end] = by_chunks_.equal_range(hash);
  const auto equal =
      std::find_if(begin, end, [&](const auto& held) { return std::ranges::equal(held.second->tokens, tokens); });
  return equal == end ? prefixes_.end() : equal->second;
}

// Gives up a prefix where all slots are taken.
bool PrefixCache::has_free_slot() {
  if (std::ssize(prefixes_) < num_slots_) return true;
  const auto first = first_to_go(nullptr, /*is_for_sequences=*/false);
  if (first == prefixes_.end()) return false;
  drop(first);
  ++stats_.num_evictions;
  return true;
}

// False where the tokens are too few, or held already: then they have been used again.
bool PrefixCache::make_room(std::span<const int32_t> tokens) {
  const std::vector<uint64_t> hashes = hashes_of(tokens);
  if (num_slots_ == 0 || hashes.empty()) return false;
  if (const auto equal = find_equal(tokens, hashes.back()); equal != prefixes_.end()) {
    prefixes_.splice(prefixes_.end(), prefixes_, equal);
    return false;
  }
  return has_free_slot();
}

// The prefix is in all three tables or in none.
void PrefixCache::keep(RequestId id, std::span<const int32_t> tokens, SequenceMemory&& memory) {
  std::vector<uint64_t> hashes = hashes_of(tokens);
  const bool is_shared = std::ssize(tokens) % chunk_ == 0 && num_beginning_with_.contains(hashes.back());
  Prefixes added;
  added.push_back({.tokens = {tokens.begin(), tokens.end()},
                   .memory = std::move(memory),
                   .hashes = std::move(hashes),
                   .id = next_id_++,
                   .made_by = id,
                   .is_shared = is_shared});
  const auto kept = added.begin();
  const auto by_chunks = by_chunks_.emplace(kept->hashes.back(), kept);
  auto next = kept->hashes.begin();
  try {
    for (; next != kept->hashes.end(); ++next) ++num_beginning_with_[*next];
  } catch (const std::bad_alloc&) {
    uncount(std::span(kept->hashes.begin(), next));
    by_chunks_.erase(by_chunks);
    throw;
  }
  kv_.add_idle(kept->memory.blocks(), 1);
  prefixes_.splice(prefixes_.end(), added);
}

void PrefixCache::uncount(std::span<const uint64_t> hashes) {
  for (const uint64_t hash : hashes) {
    const auto count = num_beginning_with_.find(hash);
    if (--count->second == 0) num_beginning_with_.erase(count);
  }
}

bool PrefixCache::keep_checkpoint(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory) {
  if (!make_room(tokens)) return false;
  const int64_t num_blocks = memory.num_missing_to_checkpoint();
  evict_for(num_blocks);
  // A slot that was given up is free only when the sequences that go on from it have read it.
  if (states_.num_free() == 0 || kv_.num_free() < num_blocks) return false;
  keep(id, tokens, memory.checkpoint());
  return true;
}

void PrefixCache::keep_rolling(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory) {
  const auto last = std::ranges::find_if(prefixes_, [&](const Prefix& prefix) {
    return prefix.made_by == id && prefix.is_rolling && !prefix.is_shared && prefix.num_pins == 0;
  });
  if (last != prefixes_.end()) drop(last);
  if (keep_checkpoint(id, tokens, memory)) prefixes_.back().is_rolling = true;
}

void PrefixCache::keep_rest(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory) {
  if (!has_replay_states_ || !memory.is_resident() || memory.has_unread_state() || !make_room(tokens)) return;
  memory.release_empty_blocks();
  keep(id, tokens, std::move(memory));
}

// The end where none may go.
PrefixCache::Prefixes::iterator PrefixCache::first_to_go(const Prefix* spared, bool is_for_sequences) {
  const auto num_shared = std::ranges::count_if(prefixes_, &Prefix::is_shared);
  const auto first_of = [&](bool may_be_shared, bool may_be_pinned) {
    return std::ranges::find_if(prefixes_, [&](const Prefix& prefix) {
      return &prefix != spared && (may_be_shared || !prefix.is_shared) && (may_be_pinned || prefix.num_pins == 0);
    });
  };
  auto first = prefixes_.end();
  if (num_shared <= num_slots_ / 2) first = first_of(/*may_be_shared=*/false, /*may_be_pinned=*/false);
  if (first == prefixes_.end()) first = first_of(/*may_be_shared=*/true, /*may_be_pinned=*/false);
  if (first == prefixes_.end() && is_for_sequences) first = first_of(/*may_be_shared=*/true, /*may_be_pinned=*/true);
  return first;
}

PrefixCache::Prefixes::iterator PrefixCache::drop(Prefixes::iterator prefix) {
  const auto [begin, end] = by_chunks_.equal_range(prefix->hashes.back());
  by_chunks_.erase(std::find_if(begin, end, [&](const auto& held) { return held.second == prefix; }));
  uncount(prefix->hashes);
  kv_.add_idle(prefix->memory.blocks(), -1);
  return prefixes_.erase(prefix);
}

void PrefixCache::forget(RequestId id) {
  for (auto prefix = prefixes_.begin(); prefix != prefixes_.end();) {
    prefix = prefix->made_by == id ? drop(prefix) : std::next(prefix);
  }
}

void PrefixCache::forget_spoilt(std::span<const int32_t> tokens) {
  for (auto prefix = prefixes_.begin(); prefix != prefixes_.end();) {
    const bool is_beginning = prefix->num_tokens() <= std::ssize(tokens) &&
                              std::equal(prefix->tokens.begin(), prefix->tokens.end(), tokens.begin());
    if (is_beginning) prefix->memory.spoil();
    prefix = is_beginning ? drop(prefix) : std::next(prefix);
  }
}

int64_t PrefixCache::pin(std::span<const int32_t> tokens) {
  Prefix* prefix = longest(tokens);
  if (prefix == nullptr) return 0;
  ++prefix->num_pins;
  return prefix->id;
}

void PrefixCache::unpin(int64_t id) {
  const auto prefix = std::ranges::find(prefixes_, id, &Prefix::id);
  if (prefix != prefixes_.end()) --prefix->num_pins;
}

const PrefixCache::Prefix* PrefixCache::pinned(int64_t id) const {
  const auto prefix = std::ranges::find(prefixes_, id, &Prefix::id);
  return prefix == prefixes_.end() ? nullptr : &*prefix;
}

bool PrefixCache::holds(std::span<const int32_t> tokens) {
  const std::vector<uint64_t> hashes = hashes_of(tokens);
  return !hashes.empty() && find_equal(tokens, hashes.back()) != prefixes_.end();
}

SequenceMemory PrefixCache::make_memory(int64_t num_tokens) {
  if (!has_free_slot()) {
    throw OutOfSlots(c10::str("[PrefixCache] expected a slot of ", num_slots_, " that no session holds, got none"));
  }
  SequenceMemory memory(states_, kv_);
  memory.allocate_state();
  evict_for(memory.num_missing(num_tokens));
  memory.grow(num_tokens);
  return memory;
}

void PrefixCache::adopt(std::span<const int32_t> tokens, SequenceMemory memory) {
  constexpr RequestId kNoRequest = 0;
  keep(kNoRequest, tokens, std::move(memory));
}

int64_t PrefixCache::num_evictable_blocks(const Prefix* spared) const {
  if (spared == nullptr) return kv_.num_idle();
  return kv_.num_idle() -
         std::ranges::count_if(spared->memory.blocks(), [&](int32_t block) { return kv_.is_idle(block); });
}

void PrefixCache::evict_for(int64_t num_blocks, const Prefix* spared) {
  while (kv_.num_free() < num_blocks) {
    const auto prefix = first_to_go(spared, /*is_for_sequences=*/true);
    if (prefix == prefixes_.end()) return;
    drop(prefix);
    ++stats_.num_evictions;
  }
}

PrefixCacheStats PrefixCache::stats() const {
  PrefixCacheStats stats = stats_;
  stats.num_prefixes = std::ssize(prefixes_);
  const int64_t state_bytes = states_.bytes() / std::max<int64_t>(states_.num_slots(), 1);
  stats.bytes = stats.num_prefixes * state_bytes + kv_.num_idle() * kv_.block_bytes();
  return stats;
}

}  // namespace xgdn
