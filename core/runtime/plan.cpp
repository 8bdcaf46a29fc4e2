// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/plan.h"

#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <utility>

#include "core/kernels/ops_api.h"
#include "core/models/tensor_parallel.h"
#include "core/runtime/mtp_drafter.h"

namespace xgdn {
namespace {

constexpr int64_t kFloatBytes = sizeof(float);
// What ATen makes of a token's indices: int64, and floating positions.
constexpr int64_t kMetadataBytes = 32;
constexpr int64_t kMostMemory = int64_t{1} << 60;  // what twice as many sequences take still fits into 64 bits

// Bytes per token of the tensors that live at once in each part of a layer. `e` is the size of an activation.
struct LayerWidths {
  const ModelConfig& c;
  int64_t e;
  bool has_int8_kv;

  // fp32: widened, squared or normed, weighted, and the sum; then the result.
  int64_t norm(int64_t width) const { return width * (4 * kFloatBytes + e); }

  int64_t gdn() const {
    const int64_t keys = c.linear_num_key_heads * c.linear_key_head_dim;
    const int64_t values = c.linear_num_value_heads * c.linear_value_head_dim;
    const int64_t heads = c.linear_num_value_heads;
    const int64_t projected = 2 * keys + 2 * values + 2 * heads;
    const int64_t convolved = 2 * keys + values;
    return (projected + convolved + values + c.hidden_size) * e + 2 * heads * kFloatBytes;
  }

  // Queries with their gates, keys, values; the norm and rotation of the queries; attended, gated, projected.
  int64_t attention() const {
    const int64_t queries = c.num_attention_heads * c.head_dim;
    const int64_t keys = c.num_key_value_heads * c.head_dim;
    return (2 * queries + 3 * keys + 6 * queries + c.hidden_size) * e + norm(queries);
  }

  // gate, silu(gate), up, their product, down.
  int64_t mlp(int64_t intermediate_size) const { return (4 * intermediate_size + c.hidden_size) * e; }

  // Router, sum over the experts, then one expert that every token may visit, or the shared one.
  int64_t moe() const {
    if (c.num_experts == 0) return 0;
    const int64_t router = c.num_experts * (e + 2 * kFloatBytes) + c.num_experts_per_tok * (8 + 3 * kFloatBytes);
    const int64_t expert = mlp(c.moe_intermediate_size) + 3 * c.hidden_size * e + 3 * 8;
    const int64_t shared = mlp(c.shared_expert_intermediate_size) + 3 * c.hidden_size * e;
    return router + c.hidden_size * e + std::max(expert, shared);
  }

  // The residual stream, its norm, the rotary table, and the widest part.
  int64_t token() const {
    const int64_t widest =
        std::max({norm(c.hidden_size), gdn(), attention(), mlp(c.intermediate_size), moe()}) + c.hidden_size * e;
    return 2 * c.hidden_size * e + c.head_dim * (2 * e + 2 * kFloatBytes) + widest + kMetadataBytes;
  }

  // Beside the model's own step: hidden states of all tokens; of the head's, embeddings, both norms, and the two
  // joined.
  int64_t mtp() const { return c.hidden_size * 6 * e; }

  int64_t logits() const { return c.vocab_size * (kFloatBytes + e) + c.hidden_size * e + norm(c.hidden_size); }

  // Of several ranks, what the first takes of all of them: parts, and the row that they make.
  int64_t gathered_logits(int64_t vocab_size) const {
    return c.vocab_size == vocab_size ? 0 : 2 * vocab_size * kFloatBytes;
  }

  // Of a number of a context once it is copied: int8 is widened.
  int64_t copied() const { return has_int8_kv ? kFloatBytes : e; }

  // Keys and values as they lie in the blocks, of int8 also widened, then repeated for every query head.
  int64_t context() const {
    const int64_t stored =
        has_int8_kv ? c.num_key_value_heads * (kernel::kv_row_size(c.head_dim, at::kChar) + kFloatBytes) : 0;
    return 2 * (stored + (c.num_key_value_heads + c.num_attention_heads) * c.head_dim * copied());
  }
};

}  // namespace

int64_t Plan::workspace_bytes(int64_t num_sequences, int64_t num_blocks, int64_t context) const {
  const int64_t capacity = std::min(num_blocks, kernel::kMaxIndex / kv_block_size) * kv_block_size;
  const BatchLimits limits{.num_slots = num_sequences,
                           .num_kv_blocks = capacity / kv_block_size,
                           .kv_block_size = kv_block_size,
                           .has_attention = num_blocks > 0,
                           .max_tokens = max_step_tokens(max_tokens_per_step, num_sequences),
                           .max_context = max_positions == 0 ? capacity : std::min(max_positions, capacity),
                           .decode_buckets = decode_buckets};
  const int64_t tokens = limits.max_tokens + limits.max_padding();
  return tokens * (step_token_bytes + context * step_mask_bytes) + num_sequences * step_logits_bytes +
         context * step_context_bytes + BatchBuilder::buffer_bytes(limits, device) +
         (has_mtp_head ? MtpDrafter::buffer_bytes(limits, device) : 0);
}

int64_t Plan::bytes_with(int64_t num_sequences, int64_t length) const {
  const int64_t blocks = num_kv_blocks == 0 ? 0 : (length + kv_block_size - 1) / kv_block_size;
  return weight_bytes + num_prefix_slots * state_slot_bytes +
         num_sequences * (state_slot_bytes + blocks * kv_block_bytes) +
         workspace_bytes(num_sequences, num_sequences * blocks, length);
}

int64_t Plan::max_sequences(int64_t length, int64_t memory_limit) const {
  if (length < 1) throw RequestError(c10::str("[Plan] length: expected at least 1 token, got ", length));
  memory_limit = std::min(memory_limit, kMostMemory);
  int64_t fits = 0;
  int64_t too_many = 1;
  while (bytes_with(too_many, length) <= memory_limit) {
    fits = too_many;
    too_many *= 2;
  }
  while (too_many - fits > 1) {
    const int64_t middle = fits + (too_many - fits) / 2;
    (bytes_with(middle, length) <= memory_limit ? fits : too_many) = middle;
  }
  return fits;
}

Plan make_plan(const ModelDirectory& opened, DecoderOptions options, const RunnerOptions& runner) {
  const c10::Device device = std::exchange(options.device, c10::kMeta);
  options.on_layer_loaded = nullptr;
  const HybridDecoder model(opened.config, CheckpointShapes(opened.checkpoint), options);
  const ModelConfig of_rank = config_of_rank(opened.config, options.shard.world);
  const LayerWidths widths{of_rank, static_cast<int64_t>(c10::elementSize(options.dtype)),
                           model.kv_dtype() == at::kChar};
  const bool copies_contexts =
      model.num_attention_layers() > 0 && kernel::copies_contexts(device, options.backends.decode);
  return {.weight_bytes = model.weight_bytes(),
          .state_slot_bytes = state_slot_bytes(model),
          .num_state_slots = runner.max_batch_size,
          .num_prefix_slots = runner.prefix_cache_slots,
          .kv_block_bytes = kv_spec(model, runner.kv_block_size).block_bytes(),
          .num_kv_blocks = num_kv_blocks(model, runner),
          .kv_block_size = runner.kv_block_size,
          .step_token_bytes = widths.token() + (model.has_mtp_head() ? widths.mtp() : 0),
          .step_logits_bytes = widths.logits() + widths.gathered_logits(opened.config.vocab_size),
          .step_context_bytes = copies_contexts ? widths.context() : 0,
          .step_mask_bytes = copies_contexts ? 1 + 2 * widths.copied() : 0,
          .max_tokens_per_step = runner.max_tokens_per_step,
          .decode_buckets = decode_buckets(runner, device),
          .has_mtp_head = model.has_mtp_head(),
          .device = device,
          .max_positions = opened.config.max_position_embeddings,
          .max_context = max_context(model, runner)};
}

}  // namespace xgdn
