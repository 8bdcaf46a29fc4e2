// SPDX-License-Identifier: Apache-2.0
#include "core/layers/qwen3_gated_delta_net.h"

#include <c10/util/StringUtil.h>

namespace xgdn {
namespace {

// The heads of one rank. With more ranks than key heads, neighbouring ranks share (replicate) a key head.
struct HeadRange {
  int64_t key_begin, key_end, value_begin, value_end;
};

HeadRange local_heads(const GdnConfig& c, const Shard& shard) {
  const auto refuse = [](const std::string& sentence) { throw ShapeError("[Qwen3GatedDeltaNet] " + sentence); };
  if (c.num_k_heads < 1 || c.num_v_heads < 1 || c.num_v_heads % c.num_k_heads != 0) {
    refuse(c10::str("num_v_heads: expected a multiple of num_k_heads=", c.num_k_heads, ", got ", c.num_v_heads));
  }
  if (shard.world < 1 || shard.rank < 0 || shard.rank >= shard.world) {
    refuse(c10::str("shard: expected a rank 0..world-1, got rank ", shard.rank, " of ", shard.world));
  }
  const bool divides =
      shard.world <= c.num_k_heads ? c.num_k_heads % shard.world == 0 : shard.world % c.num_k_heads == 0;
  if (!divides || c.num_v_heads % shard.world != 0) {
    refuse(c10::str("shard: expected a world that divides num_v_heads=", c.num_v_heads,
                    " and divides or is a multiple of ", "num_k_heads=", c.num_k_heads, ", got ", shard.world));
  }
  const int64_t value_heads = c.num_v_heads / shard.world;
  const int64_t ratio = c.num_v_heads / c.num_k_heads;
  const int64_t value_begin = shard.rank * value_heads;
  return {value_begin / ratio, (value_begin + value_heads - 1) / ratio + 1, value_begin, value_begin + value_heads};
}

// Rows q, k, v, z, b, a of one layer, whatever the checkpoint's layout.
class ProjectionRows {
 public:
  ProjectionRows(const GdnConfig& config, const HeadRange& heads, const std::string& prefix)
      : c_(config), heads_(heads), prefix_(prefix) {}

  // Qwen3.5: rows of in_proj_qkv are [q heads | k heads | v heads].
  std::vector<RowRange> separate() const {
    const int64_t key_dim = c_.num_k_heads * c_.head_k_dim;
    const int64_t value_dim = c_.num_v_heads * c_.head_v_dim;
    return {key_heads("in_proj_qkv", 2 * key_dim + value_dim, 0),
            key_heads("in_proj_qkv", 2 * key_dim + value_dim, key_dim),
            value_heads("in_proj_qkv", 2 * key_dim + value_dim, 2 * key_dim, c_.head_v_dim),
            value_heads("in_proj_z", value_dim, 0, c_.head_v_dim),
            value_heads("in_proj_b", c_.num_v_heads, 0, 1),
            value_heads("in_proj_a", c_.num_v_heads, 0, 1)};
  }

  // Qwen3-Next: for each key head the rows [q | k | its value heads' v | z], and [b | a].
  std::vector<RowRange> interleaved() const {
    const int64_t ratio = c_.num_v_heads / c_.num_k_heads;
    const int64_t value_rows = ratio * c_.head_v_dim;
    const int64_t group = 2 * c_.head_k_dim + 2 * value_rows;
    std::vector<RowRange> ranges;
    for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, c_.head_k_dim}, {c_.head_k_dim, c_.head_k_dim}}) {
      for (int64_t h = heads_.key_begin; h < heads_.key_end; ++h) {
        ranges.push_back(rows("in_proj_qkvz", c_.num_k_heads * group, h * group + begin, count));
      }
    }
    const auto add_value_heads = [&](const char* name, int64_t of_group, int64_t first, int64_t dim) {
      for (int64_t h = heads_.value_begin; h < heads_.value_end; ++h) {
        const int64_t begin = h / ratio * of_group + first + h % ratio * dim;
        ranges.push_back(rows(name, c_.num_k_heads * of_group, begin, dim));
      }
    };
    add_value_heads("in_proj_qkvz", group, 2 * c_.head_k_dim, c_.head_v_dim);
    add_value_heads("in_proj_qkvz", group, 2 * c_.head_k_dim + value_rows, c_.head_v_dim);
    add_value_heads("in_proj_ba", 2 * ratio, 0, 1);
    add_value_heads("in_proj_ba", 2 * ratio, ratio, 1);
    return ranges;
  }

 private:
  RowRange rows(const char* name, int64_t of, int64_t begin, int64_t count) const {
    return {prefix_ + name + ".weight", {of, c_.hidden_size}, begin, count};
  }
  RowRange key_heads(const char* name, int64_t of, int64_t first) const {
    return rows(name, of, first + heads_.key_begin * c_.head_k_dim,
                (heads_.key_end - heads_.key_begin) * c_.head_k_dim);
  }
  RowRange value_heads(const char* name, int64_t of, int64_t first, int64_t dim) const {
    return rows(name, of, first + heads_.value_begin * dim, (heads_.value_end - heads_.value_begin) * dim);
  }

  const GdnConfig& c_;
  const HeadRange& heads_;
  const std::string& prefix_;
};

// The rank's channels q, k, v of a per-channel weight.
std::vector<RowBlock> conv_channels(const GdnConfig& c, const HeadRange& heads, const std::string& name,
                                    const at::Tensor& channels) {
  const int64_t key_dim = c.num_k_heads * c.head_k_dim;
  const int64_t keys = (heads.key_end - heads.key_begin) * c.head_k_dim;
  const int64_t values = (heads.value_end - heads.value_begin) * c.head_v_dim;
  return {{name, channels.narrow(0, heads.key_begin * c.head_k_dim, keys)},
          {name, channels.narrow(0, key_dim + heads.key_begin * c.head_k_dim, keys)},
          {name, channels.narrow(0, 2 * key_dim + heads.value_begin * c.head_v_dim, values)}};
}

// Tokens that no segment names would come out as uninitialised memory. Nothing has been written yet.
void check_segments(const GdnBatch& batch, const at::Tensor& hidden) {
  int64_t covered = 0;
  for (const Segment& segment : batch.segments) {
    if (segment.token_begin != covered) {
      throw ShapeError(c10::str("[Qwen3GatedDeltaNet] segments: expected the next to begin at token ", covered,
                                ", got ", segment.token_begin));
    }
    covered += segment.num_tokens;
  }
  if (hidden.dim() != 2 || hidden.size(0) != covered) {
    throw ShapeError(c10::str("[Qwen3GatedDeltaNet] hidden: expected [T, hidden_size] with T=", covered,
                              " (set by the segments), got ", hidden.sizes()));
  }
}

}  // namespace

struct Qwen3GatedDeltaNet::Projected {
  at::Tensor mixed_qkv;  // [T, 2HK + HVV]
  at::Tensor z;          // [T, HV, V]
  at::Tensor b;          // [T, HV]
  at::Tensor a;          // [T, HV]
};

Qwen3GatedDeltaNet::Qwen3GatedDeltaNet(const GdnConfig& config, const WeightSource& weights, const std::string& prefix,
                                       const at::TensorOptions& options, Shard shard, BackendSelection backends)
    : local_(config), shard_(shard), backends_(std::move(backends)) {
  const HeadRange heads = local_heads(config, shard);
  local_.num_k_heads = heads.key_end - heads.key_begin;
  local_.num_v_heads = heads.value_end - heads.value_begin;

  const ProjectionRows rows(config, heads, prefix);
  const bool is_interleaved = weights.contains(prefix + "in_proj_qkvz.weight");
  in_proj_ = Projection(weights, is_interleaved ? rows.interleaved() : rows.separate(), options);

  const int64_t channels = 2 * config.num_k_heads * config.head_k_dim + config.num_v_heads * config.head_v_dim;
  const std::string conv = prefix + "conv1d.weight";
  const at::Tensor taps = weights.get(conv, {channels, 1, config.conv_kernel_dim}).squeeze(1);
  conv_weight_ = fuse_rows(weights, conv_channels(config, heads, conv, taps), options);
  const std::string bias = prefix + "conv1d.bias";
  if (weights.contains(bias)) {
    conv_bias_ = fuse_rows(weights, conv_channels(config, heads, bias, weights.get(bias, {channels})), options);
  }

  const auto per_value_head = [&](const std::string& name) {
    return weights.get(prefix + name, {config.num_v_heads})
        .narrow(0, heads.value_begin, local_.num_v_heads)
        .to(options.dtype(at::kFloat), /*non_blocking=*/false, /*copy=*/true);
  };
  A_log_ = per_value_head("A_log");
  dt_bias_ = per_value_head("dt_bias");
  norm_ = load_weight(weights, prefix + "norm.weight", {config.head_v_dim}, options.dtype(at::kFloat));

  out_proj_ = Projection::of_columns(
      weights, prefix + "out_proj.weight", {config.hidden_size, config.num_v_heads * config.head_v_dim},
      heads.value_begin * config.head_v_dim, local_.num_v_heads * config.head_v_dim, options);
}

std::vector<StateSpec> Qwen3GatedDeltaNet::state_specs() const {
  std::vector<StateSpec> specs{
      {StateKind::kConv,
       {local_.conv_kernel_dim - 1 + local_.max_draft_tokens, conv_weight_.size(0)},
       conv_weight_.scalar_type()},
      {StateKind::kDelta, {local_.num_v_heads, local_.head_v_dim, local_.head_k_dim}, local_.state_dtype}};
  if (local_.has_replay_states) {
    // Beside the tokens since the last fold, those of a verification: the last one and its drafts.
    const int64_t rows = kReplayChunk + (local_.max_draft_tokens > 0 ? local_.max_draft_tokens + 1 : 0);
    specs.push_back({StateKind::kRingK, {local_.num_k_heads, rows, local_.head_k_dim}, at::kFloat});
    specs.push_back({StateKind::kRingU, {local_.num_v_heads, rows, local_.head_v_dim}, at::kFloat});
    specs.push_back({StateKind::kRingG, {local_.num_v_heads, rows}, at::kFloat});
    specs.push_back({StateKind::kRingLength, {}, at::kInt});
  }
  return specs;
}

std::vector<at::Tensor> Qwen3GatedDeltaNet::weights() const {
  std::vector<at::Tensor> weights{conv_weight_, A_log_, dt_bias_, norm_};
  for (const Projection* projection : {&in_proj_, &out_proj_}) projection->append_weights(weights);
  if (conv_bias_) weights.push_back(*conv_bias_);
  return weights;
}

at::Tensor Qwen3GatedDeltaNet::forward(const LayerInput& hidden, const GdnBatch& batch, GdnState& state) const {
  check_segments(batch, hidden.tokens());
  const at::Tensor projected = in_proj_.forward(hidden, backends_.decode);
  const at::Tensor o =
      kernel::allocate_temporary({projected.size(0), local_.num_v_heads, local_.head_v_dim}, projected.options());
  for (const Segment& segment : batch.segments) {
    const auto rows = [&](const at::Tensor& t) { return t.narrow(0, segment.token_begin, segment.num_tokens); };
    if (segment.kind == SegmentKind::kDecode) {
      decode(segment, rows(projected), state, rows(o));
    } else {
      attend(segment, rows(projected), state, rows(o));
    }
  }
  at::Tensor out = out_proj_.forward(o.flatten(1), backends_.decode);
  shard_.add_up(out);
  return out;
}

Qwen3GatedDeltaNet::Projected Qwen3GatedDeltaNet::split(const at::Tensor& projected) const {
  const int64_t qkv = conv_weight_.size(0);
  const int64_t value_dim = local_.num_v_heads * local_.head_v_dim;
  return {.mixed_qkv = projected.narrow(1, 0, qkv),
          .z = projected.narrow(1, qkv, value_dim).unflatten(1, {local_.num_v_heads, local_.head_v_dim}),
          .b = projected.narrow(1, qkv + value_dim, local_.num_v_heads),
          .a = projected.narrow(1, qkv + value_dim + local_.num_v_heads, local_.num_v_heads)};
}

void Qwen3GatedDeltaNet::decode(const Segment& segment, const at::Tensor& projected, GdnState& state,
                                const at::Tensor& o) const {
  kernel::gdn_decode_step({.projected = projected,
                           .conv_weight = conv_weight_,
                           .conv_state = state.pool(StateKind::kConv),
                           .A_log = A_log_,
                           .dt_bias = dt_bias_,
                           .state = state.pool(StateKind::kDelta),
                           .norm_weight = norm_,
                           .state_indices = segment.state_slots.read,
                           .out = o,
                           .conv_bias = conv_bias_,
                           .write_indices = segment.state_slots.write,
                           .conv_slots = segment.conv_slots,
                           .ring = local_.has_replay_states ? std::optional(state.ring()) : std::nullopt,
                           .chunk_size = kReplayChunk,
                           .cu_seqlens = segment.cu_seqlens,
                           .host = segment.host,
                           .norm_eps = local_.rms_norm_eps,
                           .backend = backends_.decode});
}

// Prefill and verification, op by op.
void Qwen3GatedDeltaNet::attend(const Segment& segment, const at::Tensor& projected, GdnState& state,
                                const at::Tensor& o) const {
  const Projected in = split(projected);
  delta_rule(segment, convolve(segment, in.mixed_qkv, state), in.a, in.b, state, o);
  kernel::rms_norm_gated(
      {.x = o, .z = in.z, .weight = norm_, .out = o, .eps = local_.rms_norm_eps, .backend = backends_.decode});
}

at::Tensor Qwen3GatedDeltaNet::convolve(const Segment& segment, const at::Tensor& x, GdnState& state) const {
  const at::Tensor mixed_qkv = kernel::allocate_temporary({x.size(0), x.size(1)}, x.options());
  if (segment.kind == SegmentKind::kPrefill) {
    kernel::causal_conv1d({.x = x,
                           .weight = conv_weight_,
                           .conv_state = state.pool(StateKind::kConv),
                           .cu_seqlens = segment.cu_seqlens,
                           .state_indices = segment.conv_slots.read,
                           .out = mixed_qkv,
                           .bias = conv_bias_,
                           .has_initial_state = segment.has_initial_state,
                           .write_indices = segment.conv_slots.write,
                           .backend = backends_.prefill});
  } else {
    kernel::causal_conv1d_update({.x = x,
                                  .weight = conv_weight_,
                                  .conv_state = state.pool(StateKind::kConv),
                                  .cu_seqlens = segment.cu_seqlens,
                                  .state_indices = segment.conv_slots.read,
                                  .out = mixed_qkv,
                                  .host = segment.host,
                                  .bias = conv_bias_,
                                  .write_indices = segment.conv_slots.write,
                                  .num_accepted = segment.num_accepted,
                                  .backend = backends_.decode});
  }
  return mixed_qkv;
}

// Gates, then the rule over several tokens of a sequence.
void Qwen3GatedDeltaNet::delta_rule(const Segment& segment, const at::Tensor& mixed_qkv, const at::Tensor& a,
                                    const at::Tensor& b, GdnState& state, const at::Tensor& o) const {
  const bool is_prefill = segment.kind == SegmentKind::kPrefill;
  const at::Tensor g =
      kernel::allocate_temporary({segment.num_tokens, local_.num_v_heads}, a.options().dtype(at::kFloat));
  const at::Tensor beta = kernel::allocate_temporary(g.sizes(), g.options());
  kernel::gdn_gating(
      {.a = a, .b = b, .A_log = A_log_, .dt_bias = dt_bias_, .g = g, .beta = beta, .backend = backends_.decode});

  const int64_t key_dim = local_.num_k_heads * local_.head_k_dim;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  const at::Tensor q = heads(0, local_.num_k_heads, local_.head_k_dim);
  const at::Tensor k = heads(key_dim, local_.num_k_heads, local_.head_k_dim);
  const at::Tensor v = heads(2 * key_dim, local_.num_v_heads, local_.head_v_dim);
  if (local_.has_replay_states) {
    kernel::replay_gated_delta_rule({.q = q,
                                     .k = k,
                                     .v = v,
                                     .g = g,
                                     .beta = beta,
                                     .state = state.pool(StateKind::kDelta),
                                     .ring = state.ring(),
                                     .cu_seqlens = segment.cu_seqlens,
                                     .state_indices = segment.state_slots.read,
                                     .ring_indices = segment.conv_slots.read,
                                     .out = o,
                                     .write_indices = segment.state_slots.write,
                                     .ring_write_indices = segment.conv_slots.write,
                                     .num_accepted = segment.num_uncommitted,
                                     .has_initial_state = segment.has_initial_state,
                                     .host = segment.host,
                                     .chunk_size = kReplayChunk,
                                     .commit = segment.kind != SegmentKind::kVerify,
                                     .accuracy = is_prefill ? backends_.prefill_accuracy : "exact",
                                     .backend = is_prefill ? backends_.prefill : backends_.decode});
  } else if (is_prefill) {
    kernel::chunk_gated_delta_rule({.q = q,
                                    .k = k,
                                    .v = v,
                                    .g = g,
                                    .beta = beta,
                                    .state = state.pool(StateKind::kDelta),
                                    .cu_seqlens = segment.cu_seqlens,
                                    .state_indices = segment.state_slots.read,
                                    .chunk_indices = segment.chunk_indices.value_or(at::Tensor()),
                                    .chunk_offsets = segment.chunk_offsets.value_or(at::Tensor()),
                                    .out = o,
                                    .has_initial_state = segment.has_initial_state,
                                    .write_indices = segment.state_slots.write,
                                    .host = segment.host,
                                    .accuracy = backends_.prefill_accuracy,
                                    .backend = backends_.prefill});
  } else {
    kernel::recurrent_gated_delta_rule({.q = q,
                                        .k = k,
                                        .v = v,
                                        .g = g,
                                        .beta = beta,
                                        .state = state.pool(StateKind::kDelta),
                                        .cu_seqlens = segment.cu_seqlens,
                                        .state_indices = segment.state_slots.read,
                                        .out = o,
                                        .num_accepted = segment.num_accepted,
                                        .host = segment.host,
                                        .backend = backends_.decode});
  }
}

}  // namespace xgdn
