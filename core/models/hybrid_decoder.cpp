// SPDX-License-Identifier: Apache-2.0
#include "core/models/hybrid_decoder.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <c10/util/StringUtil.h>

#include <numeric>
#include <optional>
#include <string>
#include <variant>

#include "core/errors.h"
#include "core/layers/gated_attention.h"
#include "core/layers/mlp.h"
#include "core/layers/rms_norm.h"
#include "core/models/digested_weights.h"
#include "core/models/hash_bytes.h"
#include "core/models/rounded_weights.h"
#include "core/models/tensor_parallel.h"

namespace xgdn {
namespace {

using Mixer = std::variant<Qwen3GatedDeltaNet, GatedAttention>;
using FeedForward = std::variant<Mlp, SparseMoe>;

at::TensorOptions weight_options(const DecoderOptions& options) {
  return at::TensorOptions().dtype(options.dtype).device(options.device);
}

Mixer make_mixer(const ModelConfig& c, int64_t layer, const WeightSource& weights, const std::string& prefix,
                 const DecoderOptions& options) {
  if (c.layer_types[layer] == LayerType::kFullAttention) {
    const AttentionConfig attention{.hidden_size = c.hidden_size,
                                    .num_heads = c.num_attention_heads,
                                    .num_kv_heads = c.num_key_value_heads,
                                    .head_dim = c.head_dim,
                                    .rms_norm_eps = c.rms_norm_eps,
                                    .bias = c.attention_bias};
    return GatedAttention(attention, weights, prefix + "self_attn.", weight_options(options), options.backends,
                          options.shard);
  }
  const GdnConfig gdn{.hidden_size = c.hidden_size,
                      .num_k_heads = c.linear_num_key_heads,
                      .num_v_heads = c.linear_num_value_heads,
                      .head_k_dim = c.linear_key_head_dim,
                      .head_v_dim = c.linear_value_head_dim,
                      .conv_kernel_dim = c.linear_conv_kernel_dim,
                      .rms_norm_eps = c.rms_norm_eps,
                      .state_dtype = options.state_dtype,
                      .max_draft_tokens = options.max_draft_tokens,
                      .has_replay_states = options.has_replay_states};
  return Qwen3GatedDeltaNet(gdn, weights, prefix + "linear_attn.", weight_options(options), options.shard,
                            options.backends);
}

FeedForward make_feed_forward(const ModelConfig& c, int64_t layer, const WeightSource& weights,
                              const std::string& prefix, const DecoderOptions& options) {
  const at::TensorOptions tensor = weight_options(options);
  if (!c.is_sparse_layer[layer]) {
    return Mlp(weights, prefix + "mlp.", c.hidden_size, c.intermediate_size, tensor, options.backends, options.shard);
  }
  const SparseMoeConfig moe{.hidden_size = c.hidden_size,
                            .num_experts = c.num_experts,
                            .num_experts_per_tok = c.num_experts_per_tok,
                            .intermediate_size = c.moe_intermediate_size,
                            .shared_intermediate_size = c.shared_expert_intermediate_size,
                            .norm_topk_prob = c.norm_topk_prob};
  return SparseMoe(moe, weights, prefix + "mlp.", tensor, options.backends, options.shard);
}

// With its index, where the name has none. The first line of torch's sentence names what is absent.
c10::Device usable(c10::Device device) {
  try {
    return at::empty({1}, device).device();
  } catch (const c10::Error& error) {
    const std::string sentence = error.what_without_backtrace();
    throw DeviceError(c10::str("[HybridDecoder] device: expected one that this process can use, got ", device.str(),
                               ": ", sentence.substr(0, sentence.find('\n'))));
  }
}

// Stored tensors of the token embedding and of the head.
struct TableNames {
  std::string embedding;
  std::string head;

  bool is_tied() const { return embedding == head; }
};

// Where the config ties the two, one of them is enough; two that differ are both used, as transformers does.
TableNames table_names(const ModelConfig& config, const WeightSource& weights) {
  TableNames names{config.weight_prefix + "embed_tokens.weight", "lm_head.weight"};
  if (!config.tie_word_embeddings) return names;
  if (!weights.contains(names.head) || weights.is_same(names.embedding, names.head)) {
    names.head = names.embedding;
  } else if (!weights.contains(names.embedding)) {
    names.embedding = names.head;
  }
  return names;
}

// The rank's rows of the head in 8 or 4 bits, or nullopt where it is plain.
std::optional<Projection> load_packed_head(const ModelConfig& config, const WeightSource& weights,
                                           const std::string& name, const PieceRange& part,
                                           const at::TensorOptions& options) {
  const auto rows = weights.quantized(name, {config.vocab_size, config.hidden_size});
  if (!rows) return std::nullopt;
  Projection head(load_quantized(rows->narrow(part.begin, part.count), options), part.count);
  weights.release(name);
  return head;
}

// The rank's rows of a table of all tokens.
at::Tensor load_table(const ModelConfig& config, const WeightSource& weights, const std::string& name,
                      const PieceRange& part, const at::TensorOptions& options) {
  const std::vector<int64_t> shape{config.vocab_size, config.hidden_size};
  if (part.count == config.vocab_size) return load_weight(weights, name, shape, options);
  return load_part(weights, name, weights.get(name, shape).narrow(0, part.begin, part.count), options);
}

const ModelConfig& checked(const ModelConfig& config, const Shard& shard) {
  check_tensor_parallel(config, shard.world);
  return config;
}

at::Tensor rows_of(const at::Tensor& table, const at::Tensor& indices) {
  at::Tensor rows = kernel::allocate_temporary({indices.size(0), table.size(1)}, table.options());
  return at::index_select_out(rows, table, 0, indices);
}

}  // namespace

struct HybridDecoder::Layer {
  at::Tensor input_norm;           // [hidden]
  at::Tensor post_attention_norm;  // [hidden]
  Mixer mixer;
  FeedForward feed_forward;
};

HybridDecoder::HybridDecoder(const ModelConfig& config, const WeightSource& source, const DecoderOptions& options)
    : config_(checked(config, options.shard)),
      config_of_rank_(config_of_rank(config, options.shard.world)),
      shard_(options.shard),
      dtype_(options.dtype),
      kv_dtype_(options.kv_dtype.value_or(options.dtype)),
      device_(usable(options.device)),
      backend_(options.backends.decode),
      rotary_(config.head_dim, config.partial_rotary_factor, config.rope_theta, device_) {
  const DigestedWeights stored(source);
  const RoundedWeights weights(stored, options.quantize, options.activation_bits);
  const std::string& root = config.weight_prefix;
  const at::TensorOptions tensor = weight_options(options);
  const PieceRange tokens = even_part(options.shard, "HybridDecoder", "vocab_size", config.vocab_size);
  const TableNames names = table_names(config, weights);
  has_tied_head_ = names.is_tied();
  // First, so that what rounding it takes beside its own size is less than what the decoder keeps in the end.
  std::optional<Projection> packed_head = load_packed_head(config, weights, names.head, tokens, tensor);
  embedding_ = load_table(config, weights, names.embedding, tokens, tensor);
  if (packed_head) {
    lm_head_ = *std::move(packed_head);
  } else {
    lm_head_ = Projection(names.is_tied() ? embedding_ : load_table(config, weights, names.head, tokens, tensor));
  }
  norm_ = load_weight(weights, root + "norm.weight", {config.hidden_size}, tensor);
  const auto load_layer = [&](const ModelConfig& c, int64_t i, const std::string& prefix) {
    const auto norm = [&](const char* name) { return load_weight(weights, prefix + name, {c.hidden_size}, tensor); };
    return std::make_unique<Layer>(Layer{.input_norm = norm("input_layernorm.weight"),
                                         .post_attention_norm = norm("post_attention_layernorm.weight"),
                                         .mixer = make_mixer(c, i, weights, prefix, options),
                                         .feed_forward = make_feed_forward(c, i, weights, prefix, options)});
  };
  const int64_t num_to_load = config.num_hidden_layers + (options.has_mtp_head ? 1 : 0);
  const auto report = [&](int64_t loaded) {
    if (options.on_layer_loaded) options.on_layer_loaded(loaded, num_to_load);
  };
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    layers_.push_back(load_layer(config, i, root + "layers." + std::to_string(i) + "."));
    report(i + 1);
  }
  if (options.has_mtp_head) {
    mtp_head_ = std::make_unique<MtpHead>(config, weights, tensor, backend_);
    mtp_layer_ = load_layer(with_mtp_layer(config), config.num_hidden_layers, kMtpLayer);
    report(num_to_load);
  }
  max_draft_tokens_ = options.max_draft_tokens;
  const int rounding = options.quantize ? static_cast<int>(*options.quantize) + 1 : 0;
  digest_ = hash_bytes(stored.digest(), c10::str(c10::toString(dtype_), " ", rounding,
                                                 options.activation_bits == 16 ? "" : " in bytes"));
}

HybridDecoder::~HybridDecoder() = default;

std::vector<std::vector<StateSpec>> HybridDecoder::state_specs() const {
  std::vector<std::vector<StateSpec>> specs;
  for (const auto& layer : layers_) {
    if (const auto* gdn = std::get_if<Qwen3GatedDeltaNet>(&layer->mixer)) specs.push_back(gdn->state_specs());
  }
  return specs;
}

int64_t HybridDecoder::num_attention_layers() const {
  return static_cast<int64_t>(all_layers().size() - state_specs().size());
}

std::vector<const HybridDecoder::Layer*> HybridDecoder::all_layers() const {
  std::vector<const Layer*> layers;
  for (const auto& layer : layers_) layers.push_back(layer.get());
  if (mtp_layer_) layers.push_back(mtp_layer_.get());
  return layers;
}

int64_t HybridDecoder::weight_bytes() const {
  std::vector<at::Tensor> head;
  lm_head_.append_weights(head);
  const bool shares_tensor = head.front().is_same(embedding_);
  return streamed_bytes() + (shares_tensor ? 0 : static_cast<int64_t>(embedding_.nbytes()));
}

int64_t HybridDecoder::streamed_bytes() const {
  std::vector<at::Tensor> weights{norm_};
  lm_head_.append_weights(weights);
  if (mtp_head_) {
    const std::vector<at::Tensor> of_head = mtp_head_->weights();
    weights.insert(weights.end(), of_head.begin(), of_head.end());
  }
  for (const Layer* layer : all_layers()) {
    weights.insert(weights.end(), {layer->input_norm, layer->post_attention_norm});
    for (const std::vector<at::Tensor>& part :
         {std::visit([](const auto& mixer) { return mixer.weights(); }, layer->mixer),
          std::visit([](const auto& ff) { return ff.weights(); }, layer->feed_forward)}) {
      weights.insert(weights.end(), part.begin(), part.end());
    }
  }
  return std::accumulate(weights.begin(), weights.end(), int64_t{0},
                         [](int64_t sum, const at::Tensor& t) { return sum + static_cast<int64_t>(t.nbytes()); });
}

StepOutput HybridDecoder::forward(const StepInput& input, ModelState& state) const {
  if (input.token_ids.device() != device_) {
    throw DeviceError(c10::str("[HybridDecoder] input: expected a step built for ", device_.str(), ", got one on ",
                               input.token_ids.device().str()));
  }
  kernel::check_storage("HybridDecoder", "token_ids", input.token_ids);
  if (input.logit_rows.defined()) kernel::check_storage("HybridDecoder", "logit_rows", input.logit_rows);
  if (input.hidden_rows.defined()) kernel::check_storage("HybridDecoder", "hidden_rows", input.hidden_rows);
  kernel::check_storage("HybridDecoder", "positions", input.attention.positions);
  kernel::check_storage("HybridDecoder", "embed_tokens", embedding_);
  ResidualStream stream{.residual = embed(input.token_ids)};
  const RotaryTable rotary = rotary_.table(input.attention.positions, dtype_);
  size_t gdn_layer = 0;
  size_t attention_layer = 0;
  for (const auto& layer : layers_) {
    run(*layer, stream, rotary, input, state, gdn_layer, attention_layer);
    ++(std::holds_alternative<GatedAttention>(layer->mixer) ? attention_layer : gdn_layer);
  }
  // The norm writes to the residual rows: those of the logits are copies wherever others are read after them.
  const auto last = [&](const at::Tensor& indices) {
    const auto wanted = [&](const at::Tensor& rows) { return indices.defined() ? rows_of(rows, indices) : rows; };
    return add_rms_norm_zero_centred(wanted(stream.branch), wanted(stream.residual), norm_, config_.rms_norm_eps,
                                     backend_);
  };
  StepOutput output;
  if (mtp_head_) {
    output.all_hidden = last({});
    const auto wanted = [&](const at::Tensor& indices) { return rows_of(output.all_hidden, indices); };
    if (input.hidden_rows.defined()) output.hidden = wanted(input.hidden_rows);
    output.logits = logits(input.logit_rows.defined() ? wanted(input.logit_rows) : output.all_hidden);
    return output;
  }
  if (input.hidden_rows.defined()) output.hidden = last(input.hidden_rows);
  output.logits = logits(last(input.logit_rows));
  return output;
}

// Of several ranks, each has the rows of its tokens and zeros for the others.
at::Tensor HybridDecoder::embed(const at::Tensor& token_ids) const {
  if (shard_.world == 1) return rows_of(embedding_, token_ids);
  const int64_t count = embedding_.size(0);
  const at::Tensor own = token_ids - shard_.rank * count;
  at::Tensor rows = rows_of(embedding_, own.clamp(0, count - 1));
  rows.masked_fill_(own.lt(0).logical_or_(own.ge(count)).unsqueeze(1), 0);
  shard_.add_up(rows);
  return rows;
}

// `gdn_layer` and `attention_layer`: the layer's place among those of its kind; only its own is read.
void HybridDecoder::run(const Layer& layer, ResidualStream& stream, const RotaryTable& rotary, const StepInput& input,
                        ModelState& state, size_t gdn_layer, size_t attention_layer) const {
  const LayerInput x(stream, layer.input_norm, config_.rms_norm_eps);
  if (const auto* gdn = std::get_if<Qwen3GatedDeltaNet>(&layer.mixer)) {
    stream.branch = gdn->forward(x, input.gdn, state.gdn[gdn_layer]);
  } else {
    const auto& attention = std::get<GatedAttention>(layer.mixer);
    stream.branch = attention.forward(x, rotary, input.attention, state.kv[attention_layer]);
  }
  const LayerInput y(stream, layer.post_attention_norm, config_.rms_norm_eps);
  stream.branch = std::visit([&](const auto& ff) { return ff.forward(y); }, layer.feed_forward);
}

at::Tensor HybridDecoder::forward_mtp(const StepInput& input, const at::Tensor& hidden, ModelState& state) const {
  ResidualStream stream{.residual = mtp_head_->combine(embed(input.token_ids), hidden)};
  const RotaryTable rotary = rotary_.table(input.attention.positions, dtype_);
  run(*mtp_layer_, stream, rotary, input, state, state.gdn.size(), state.kv.size() - 1);
  return mtp_head_->finish(stream);
}

at::Tensor HybridDecoder::logits(const at::Tensor& hidden) const {
  return lm_head_.forward(hidden, backend_, at::kFloat);
}

}  // namespace xgdn
