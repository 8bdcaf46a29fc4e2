// SPDX-License-Identifier: Apache-2.0
// States of prompts and replies that are kept for later requests, whose prompts begin with the same tokens.
#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/runtime/request.h"
#include "core/runtime/sequence_memory.h"

namespace xgdn {

/// What a prefix cache holds and has done so far.
struct PrefixCacheStats {
  int64_t num_prefixes = 0;   // held
  int64_t bytes = 0;          // of their states, and of the keys and values that nobody else holds
  int64_t num_looked_up = 0;  // tokens of the prompts that were looked up
  int64_t num_found = 0;      // of these, the tokens whose state was there
  int64_t num_evictions = 0;  // prefixes given up for others, or for running sequences
};

/// States, with their keys and values, of the first tokens of prompts. For one thread at a time.
///
/// Where room is wanted the least recently used one goes first: of those that no second prompt has begun with, as long
/// as the others have at most half of the slots. So what many prompts begin with outlives what each of them leaves.
/// Sequences that run never wait for a prefix.
///
/// Replay states are the same by whatever route their tokens came, so they are kept after any token, those of replies
/// too. Plain states are kept after multiples of kChunkSize tokens of prompts, where a prompt that comes in pieces has
/// them as well. So what follows has the bits that it has without the cache.
///
/// Prefixes are found by chained hashes of chunks of tokens and then compared token by token: two that share a hash
/// cost time, nothing else.
class PrefixCache {
 public:
  /// num_slots: of each group of the pool's, one a prefix; 0: nothing is kept. The pools must outlive it.
  PrefixCache(int64_t num_slots, StatePool& states, KvCache& kv);
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  /// The state after some tokens.
  struct Prefix {
    std::vector<int32_t> tokens;
    SequenceMemory memory;         // after all of them; resident
    std::vector<uint64_t> hashes;  // of the first chunk of tokens, of the first two, ...
    int64_t id;                    // of no other one
    RequestId made_by;
    bool is_shared;           // a second prompt has begun with it
    int64_t num_pins = 0;     // see pin()
    bool is_rolling = false;  // see keep_rolling()

    int64_t num_tokens() const { return std::ssize(tokens); }  // that the state is of
  };

  /// The longest prefix of a prompt that leaves a token to compute, or nullptr; valid until the cache is changed.
  Prefix* find(std::span<const int32_t> prompt);

  /// Books a prompt as looked up, of which `prefix`, unless null, was found, and lets `memory`, resident and with
  /// nothing computed, go on from there. Throws OutOfBlocks as SequenceMemory::fork.
  void use(Prefix* prefix, std::span<const int32_t> prompt, SequenceMemory& memory);

  /// After how many tokens of a prompt its state is worth keeping, beyond the first num_computed: where it parts from a
  /// prefix that is held, and at its end; of plain states at the end of its whole chunks, unless a step more for what
  /// is left costs too much. Ascending.
  std::vector<int64_t> checkpoints(std::span<const int32_t> prompt, int64_t num_computed) const;

  /// Keeps the state after `tokens`, which `memory` has computed and goes on from as a fork. Returns whether it did:
  /// not where there is no room for another state, or one of them is held.
  bool keep_checkpoint(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory);

  /// The same for a state that takes the place of the last one that the request has kept so, unless others go on from
  /// that.
  void keep_rolling(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory);

  /// Keeps the state after `tokens` that a sequence leaves behind, where it may be kept: `memory` is of no pools then.
  void keep_rest(RequestId id, std::span<const int32_t> tokens, SequenceMemory& memory);

  /// Drops what a request has left here.
  void forget(RequestId id);
  /// Drops what a sequence of these tokens may have gone on from, and has it cleared.
  void forget_spoilt(std::span<const int32_t> tokens);

  /// Pins the longest prefix of `tokens`, all of them included, until it has been unpinned as often, and returns its
  /// id; 0 without. It is not given up for other prefixes, and for running sequences after all others.
  int64_t pin(std::span<const int32_t> tokens);
  /// One pin less; of an id that is not held any more nothing.
  void unpin(int64_t id);
  /// The prefix of that id, or nullptr when it has been given up.
  const Prefix* pinned(int64_t id) const;

  /// A memory for the state after num_tokens tokens that comes from elsewhere, with a slot and room. Throws OutOfSlots
  /// and OutOfBlocks.
  SequenceMemory make_memory(int64_t num_tokens);
  /// Whether the state after these tokens is held.
  bool holds(std::span<const int32_t> tokens);
  /// Takes in such a memory, which has computed the tokens, at least least_tokens().
  void adopt(std::span<const int32_t> tokens, SequenceMemory memory);

  /// Blocks that prefixes alone hold, those of `spared` not counted.
  int64_t num_evictable_blocks(const Prefix* spared = nullptr) const;
  /// Gives up prefixes other than `spared` until num_blocks blocks are free or none is left.
  void evict_for(int64_t num_blocks, const Prefix* spared = nullptr);

  /// Held, and done so far.
  PrefixCacheStats stats() const;
  int64_t num_slots() const { return num_slots_; }  // of each group
  int64_t least_tokens() const { return chunk_; }   // of a prefix

 private:
  using Prefixes = std::list<Prefix>;

  std::vector<uint64_t> hashes_of(std::span<const int32_t> tokens) const;
  Prefix* longest(std::span<const int32_t> tokens);
  Prefixes::iterator find_equal(std::span<const int32_t> tokens, uint64_t hash);
  bool has_free_slot();
  void uncount(std::span<const uint64_t> hashes);
  bool make_room(std::span<const int32_t> tokens);
  void keep(RequestId id, std::span<const int32_t> tokens, SequenceMemory&& memory);
  Prefixes::iterator first_to_go(const Prefix* spared, bool is_for_sequences);
  Prefixes::iterator drop(Prefixes::iterator prefix);

  int64_t num_slots_;
  bool has_replay_states_;
  int64_t chunk_;  // tokens
  StatePool& states_;
  KvCache& kv_;
  Prefixes prefixes_;                                                // the least recently used first
  std::unordered_multimap<uint64_t, Prefixes::iterator> by_chunks_;  // by the hash of all whole chunks
  std::unordered_map<uint64_t, int64_t> num_beginning_with_;         // prefixes, by the hash of their first chunks
  int64_t next_id_ = 1;
  PrefixCacheStats stats_;
};

}  // namespace xgdn
