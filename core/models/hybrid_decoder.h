// SPDX-License-Identifier: Apache-2.0
// The decoder of Qwen3.5 (dense and MoE) and Qwen3-Next: token embedding, GDN and full-attention layers, norm, head.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/layers/attention_batch.h"
#include "core/layers/gdn_batch.h"
#include "core/layers/gdn_state.h"
#include "core/layers/projection.h"
#include "core/layers/qwen3_gated_delta_net.h"
#include "core/layers/rotary.h"
#include "core/layers/shard.h"
#include "core/layers/weight_source.h"
#include "core/models/model_config.h"
#include "core/models/mtp_head.h"

namespace xgdn {

/// One step of a model. Index tensors are int32 on the model's device.
struct StepInput {
  at::Tensor token_ids;    // [T]
  at::Tensor logit_rows;   // [R]  tokens whose logits are wanted; undefined: all
  at::Tensor hidden_rows;  // [P]  tokens whose hidden states are wanted; undefined: none
  GdnBatch gdn;
  AttentionBatch attention;
};

/// What a step gives.
struct StepOutput {
  at::Tensor logits;  // [R, vocab] f32; of a shard the rank's part of the vocabulary
  at::Tensor hidden;  // [P, hidden], behind the last norm; undefined where none are wanted

  at::Tensor all_hidden;  // [T, hidden], the same of all tokens, where the decoder has an MTP head; else undefined
};

/// The pools of all layers, in layer order, that of the MTP head last. Filled by the runtime.
struct ModelState {
  std::vector<GdnState> gdn;
  std::vector<KvPool> kv;
};

/// How to build a decoder, beside what its config says.
struct DecoderOptions {
  at::ScalarType dtype = at::kFloat;            // of weights and activations
  c10::Device device = c10::kCPU;               // of weights, activations and pools
  at::ScalarType state_dtype = at::kFloat;      // of the delta-rule states
  bool has_replay_states = false;               // checkpoints and rings, in place of plain states
  std::optional<at::ScalarType> kv_dtype = {};  // of keys and values; default dtype
  int64_t max_draft_tokens = 0;                 // that a step may verify for a sequence
  bool has_mtp_head = false;                    // loads the weights' own draft head, see MtpHead
  BackendSelection backends;
  std::optional<kernel::WeightFormat> quantize = {};  // rounds the weights of products, see RoundedWeights
  int64_t activation_bits = 16;                       // see kernel::QuantizedWeight
  Shard shard = {};  // of several ranks: the group sums what each layer's parts add up to
  std::function<void(int64_t loaded, int64_t total)> on_layer_loaded;  // may be empty
};

/// A decoder: weights, and no state of any sequence. One of several ranks has its heads of every layer, its part of the
/// intermediate sizes and of the vocabulary, and all of norms and routers; hidden states are the same on all ranks.
class HybridDecoder {
 public:
  /// Builds every layer from the source. Throws CheckpointError for missing or misshapen weights, DeviceError for a
  /// device that the process cannot use, UnsupportedError for weights that cannot be rounded as options ask or split,
  /// RequestError for a world that does not divide the model (check_tensor_parallel).
  HybridDecoder(const ModelConfig& config, const WeightSource& source, const DecoderOptions& options);
  HybridDecoder(const HybridDecoder&) = delete;
  HybridDecoder& operator=(const HybridDecoder&) = delete;
  ~HybridDecoder();

  /// Updates the state in place. Throws DeviceError for a step built for another device.
  StepOutput forward(const StepInput& input, ModelState& state) const;

  /// Hidden states [T, hidden] of the MTP head for logits(), where there is one: what may come behind each of
  /// `input.token_ids`, which follow the tokens at the positions of `input.attention`. `hidden` [T, hidden] is of those
  /// tokens, by forward() or by this function. Writes the head's keys and values for these positions; nothing of the
  /// input's but token ids and attention is read.
  at::Tensor forward_mtp(const StepInput& input, const at::Tensor& hidden, ModelState& state) const;

  /// Logits [P, vocab] f32 of hidden states [P, hidden] that forward() or forward_mtp() gave; of a shard as in
  /// StepOutput.
  at::Tensor logits(const at::Tensor& hidden) const;

  /// Pools of each GDN layer that this rank has, in order.
  std::vector<std::vector<StateSpec>> state_specs() const;
  /// Key and value heads that this rank has in an attention layer's cache.
  int64_t num_kv_heads() const { return config_of_rank_.num_key_value_heads; }
  /// Which rank this is, of how many.
  const Shard& shard() const { return shard_; }
  /// Whether there is an MTP head.
  bool has_mtp_head() const { return mtp_head_ != nullptr; }
  /// Layers with full attention, each with a KvPool; that of the MTP head is one.
  int64_t num_attention_layers() const;
  /// Whether the head has the weights of the token embedding, be it the same tensor or a rounded copy.
  bool has_tied_head() const { return has_tied_head_; }
  /// Bytes of all tensors of the model, a tied head counted once.
  int64_t weight_bytes() const;
  /// Bytes of the tensors that a step reads whole: all but the token embedding where the head is another tensor.
  int64_t streamed_bytes() const;
  /// Tells this model from others: by its weights, their dtype and how they were rounded.
  uint64_t digest() const { return digest_; }
  const ModelConfig& config() const { return config_; }           // as given: of the whole model
  int64_t max_draft_tokens() const { return max_draft_tokens_; }  // as given
  at::ScalarType dtype() const { return dtype_; }                 // of weights and activations
  at::ScalarType kv_dtype() const { return kv_dtype_; }           // of keys and values
  c10::Device device() const { return device_; }                  // of weights, activations and pools

 private:
  struct Layer;

  at::Tensor embed(const at::Tensor& token_ids) const;
  void run(const Layer& layer, ResidualStream& stream, const RotaryTable& rotary, const StepInput& input,
           ModelState& state, size_t gdn_layer, size_t attention_layer) const;
  std::vector<const Layer*> all_layers() const;

  ModelConfig config_;
  ModelConfig config_of_rank_;
  Shard shard_;
  at::ScalarType dtype_;
  at::ScalarType kv_dtype_;
  c10::Device device_;
  std::string backend_;
  Rotary rotary_;
  at::Tensor embedding_;  // [vocab, hidden], of a shard the rank's rows
  at::Tensor norm_;       // [hidden]
  Projection lm_head_;    // [vocab, hidden], as above
  bool has_tied_head_ = false;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::unique_ptr<MtpHead> mtp_head_;  // null: none
  std::unique_ptr<Layer> mtp_layer_;   // of the head
  int64_t max_draft_tokens_ = 0;
  uint64_t digest_ = 0;
};

}  // namespace xgdn
