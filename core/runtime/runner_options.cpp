// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/runner_options.h"

#include <c10/util/StringUtil.h>

#include <algorithm>

namespace xgdn {

void RunnerOptions::check() const {
  const auto check_size = [](const char* name, int64_t most, int64_t got) {
    if (got < 1) throw RequestError(c10::str("[RunnerOptions] ", name, ": expected at least 1, got ", got));
    if (got > most) throw RequestError(c10::str("[RunnerOptions] ", name, ": expected at most ", most, ", got ", got));
  };
  check_size("max_batch_size", kernel::kMaxIndex, max_batch_size);
  if (prefix_cache_slots < 0 || prefix_cache_slots > kernel::kMaxIndex - max_batch_size) {
    throw RequestError(c10::str("[RunnerOptions] prefix_cache_slots: expected 0..", kernel::kMaxIndex - max_batch_size,
                                ", got ", prefix_cache_slots));
  }
  check_size("kv_block_size", kernel::kMaxIndex, kv_block_size);
  check_size("max_cached_tokens", kernel::kMaxIndex / kv_block_size * kv_block_size, max_cached_tokens);
  check_size("max_tokens_per_step", kernel::kMaxIndex, max_tokens_per_step);
  SchedulerOptions{.max_tokens_per_step = max_tokens_per_step}.check();
  BatchLimits{.decode_buckets = decode_buckets}.check();
}

int64_t num_state_slots(const RunnerOptions& options) {
  return options.max_batch_size + options.prefix_cache_slots;
}

int64_t state_slot_bytes(const HybridDecoder& model) {
  return StatePool::slot_bytes(model.state_specs());
}

KvCacheSpec kv_spec(const HybridDecoder& model, int64_t kv_block_size) {
  return {.num_layers = model.num_attention_layers(),
          .num_kv_heads = model.num_kv_heads(),
          .head_dim = model.config().head_dim,
          .block_size = kv_block_size,
          .dtype = model.kv_dtype()};
}

int64_t num_kv_blocks(const HybridDecoder& model, const RunnerOptions& options) {
  options.check();
  if (model.num_attention_layers() == 0) return 0;
  return (options.max_cached_tokens + options.kv_block_size - 1) / options.kv_block_size;
}

int64_t max_context(const HybridDecoder& model, const RunnerOptions& options) {
  const int64_t num_positions = model.config().max_position_embeddings;
  const int64_t capacity = num_kv_blocks(model, options) * options.kv_block_size;
  if (model.num_attention_layers() == 0) return num_positions;
  return num_positions == 0 ? capacity : std::min(num_positions, capacity);
}

int64_t max_step_tokens(int64_t max_tokens_per_step, int64_t max_batch_size) {
  return std::max(max_tokens_per_step, max_batch_size + kernel::kChunkSize);
}

std::vector<int64_t> decode_buckets(const RunnerOptions& options, c10::Device device) {
  if (!options.decode_buckets.empty() || !kernel::has_graphs(device)) return options.decode_buckets;
  std::vector<int64_t> buckets;
  for (int64_t size = 1; size < options.max_batch_size; size *= 2) {
    buckets.push_back(size);
    if (const int64_t between = size + size / 2; size > 1 && between < options.max_batch_size)
      buckets.push_back(between);
  }
  buckets.push_back(options.max_batch_size);
  return buckets;
}

bool runs_ahead(const HybridDecoder& model, const RunnerOptions& options) {
  return model.max_draft_tokens() == 0 && options.run_ahead.value_or(kernel::finds_largest_logits(model.device()));
}

BatchLimits batch_limits(const HybridDecoder& model, const RunnerOptions& options) {
  const int64_t context = max_context(model, options);
  return {.num_slots = num_state_slots(options),
          .num_kv_blocks = num_kv_blocks(model, options),
          .kv_block_size = options.kv_block_size,
          .vocab_size = model.config().vocab_size,
          .has_attention = model.num_attention_layers() > 0,
          .max_tokens = max_step_tokens(options.max_tokens_per_step, options.max_batch_size),
          .max_context = context == 0 ? std::nullopt : std::optional(context),
          .max_sequences = options.max_batch_size,
          .decode_buckets = decode_buckets(options, model.device())};
}

}  // namespace xgdn
