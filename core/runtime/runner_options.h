// SPDX-License-Identifier: Apache-2.0
// How much an engine holds and what a step may take, and the sizes that follow for a model.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/models/hybrid_decoder.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/kv_cache.h"
#include "core/runtime/scheduler.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// Sizes of the pools and of a step.
struct RunnerOptions {
  int64_t max_batch_size = 32;        // state slots: sequences that run at once
  int64_t max_cached_tokens = 16384;  // KV cache, over all sequences, rounded up to blocks
  int64_t kv_block_size = 16;         // tokens
  int64_t max_tokens_per_step = SchedulerOptions().max_tokens_per_step;
  // As BatchLimits::decode_buckets. None: a device with graphs has sizes up to max_batch_size, no two of which are
  // further apart than by half; elsewhere decodes are not padded.
  std::vector<int64_t> decode_buckets = {};
  // Further state slots, one for each prefix of prompts that is kept for later ones (PrefixCache). 0: none is.
  int64_t prefix_cache_slots = 0;
  bool poison_freed_slots = poison_freed_by_default();
  // Whether a step may start before the tokens of the one before it are on the host. None: where the device finds them.
  std::optional<bool> run_ahead = {};

  /// Throws RequestError for a size that no engine can have.
  void check() const;
};

/// Slots of running sequences and of cached prefixes.
int64_t num_state_slots(const RunnerOptions& options);

/// Bytes of one slot over all GDN layers.
int64_t state_slot_bytes(const HybridDecoder& model);

/// The KV cache's shape.
KvCacheSpec kv_spec(const HybridDecoder& model, int64_t kv_block_size);

/// Blocks of the KV cache; 0 without full attention.
int64_t num_kv_blocks(const HybridDecoder& model, const RunnerOptions& options);

/// Tokens of the longest sequence, prompt and reply: what the model has positions and the KV cache has room for. 0:
/// any.
int64_t max_context(const HybridDecoder& model, const RunnerOptions& options);

/// Tokens of the largest step: its budget, or a decode of every slot and one chunk of a prompt.
int64_t max_step_tokens(int64_t max_tokens_per_step, int64_t max_batch_size);

/// BatchLimits::decode_buckets of an engine on that device.
std::vector<int64_t> decode_buckets(const RunnerOptions& options, c10::Device device);

/// Whether an engine of that model, in one process, starts greedy decodes before it knows their tokens: not with
/// drafts, which it makes of them.
bool runs_ahead(const HybridDecoder& model, const RunnerOptions& options);

/// What the steps of an engine are checked against.
BatchLimits batch_limits(const HybridDecoder& model, const RunnerOptions& options);

}  // namespace xgdn
