// SPDX-License-Identifier: Apache-2.0
// What the GPU's kernels take, from tensors; what no kernel of ours is for, by ATen. Nothing here waits for the device
// or reads a value from it, so that a step can be captured in a graph.
#include "core/kernels/cuda/cuda_backend.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/StringUtil.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>

#include "core/kernels/aten/attention.h"
#include "core/kernels/aten/delta_rule.h"
#include "core/kernels/aten/linear.h"
#include "core/kernels/aten/moe.h"
#include "core/kernels/aten/norm.h"
#include "core/kernels/aten/state.h"
#include "core/kernels/cuda/alignment.h"
#include "core/kernels/cuda/causal_conv1d.h"
#include "core/kernels/cuda/chunk_gated_delta_rule.h"
#include "core/kernels/cuda/elementwise_gates.h"
#include "core/kernels/cuda/gdn_decode_step.h"
#include "core/kernels/cuda/gdn_gating.h"
#include "core/kernels/cuda/graph.h"
#include "core/kernels/cuda/largest_logits.h"
#include "core/kernels/cuda/likeliest_logits.h"
#include "core/kernels/cuda/linear.h"
#include "core/kernels/cuda/moe_experts.h"
#include "core/kernels/cuda/paged_attention.h"
#include "core/kernels/cuda/recurrent_gated_delta_rule.h"
#include "core/kernels/cuda/replay_gated_delta_rule.h"
#include "core/kernels/cuda/replay_prompt.h"
#include "core/kernels/cuda/rms_norm.h"
#include "core/kernels/cuda/rms_norm_gated.h"
#include "core/kernels/cuda/store_kv.h"
#include "core/kernels/op_tensor_args.h"

namespace xgdn::kernel {
namespace {

using cuda::is_aligned;

using Sentence = std::optional<std::string>;

cudaStream_t current_stream(const at::Tensor& t) {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(t.device())));
}

// Kernels read rows in packets of 16 bytes: others are copied first.
at::Tensor with_aligned_rows(const at::Tensor& t) {
  return is_aligned(in_rows(t)) ? t : t.contiguous();
}

// Memory for a call, of the allocator's, which a captured graph keeps.
at::Tensor scratch(size_t bytes, const at::Tensor& beside) {
  return at::empty({static_cast<int64_t>(bytes)}, beside.options().dtype(at::kByte));
}

Sentence why_not_key_dim(int64_t K) {
  if (cuda::recurrent_supports(K)) return std::nullopt;
  return c10::str("its kernels are for K = 16, 32, 64, 128 or 256, got K=", K);
}

bool has_aligned_slots(const at::Tensor& pool) {
  const int64_t slot_bytes = pool.stride(0) * static_cast<int64_t>(pool.element_size());
  return reinterpret_cast<uintptr_t>(pool.const_data_ptr()) % 16 == 0 && slot_bytes % 16 == 0;
}

template <class Params>
Sentence why_not_replay(const Params& p, const ReplayShape& s) {
  if (Sentence why = why_not_key_dim(s.rule.K)) return why;
  if (has_aligned_slots(p.state) && has_aligned_slots(p.ring.k)) return std::nullopt;
  return "its kernels want slots of state and ring_k at multiples of 16 bytes, got others";
}

// Whether the kernel of a decode step serves it; others are made of their ops.
bool has_decode_step(const DecodeStepArgs& args) {
  return !args.has_replay_states() && cuda::decode_step_supports(args);
}

void run_recurrent(cuda::RecurrentGatedDeltaRuleArgs args, const GdnShape& s, const at::Tensor& q,
                   const at::Tensor& k) {
  const at::Tensor aligned_q = with_aligned_rows(q), aligned_k = with_aligned_rows(k);
  args.q = in_rows(aligned_q);
  args.k = in_rows(aligned_k);
  args.T = s.T;
  args.num_slots = s.S;
  cuda::recurrent_gated_delta_rule(args, current_stream(q));
}

template <class Params>
cuda::LinearArgs linear_args(const Params& p, const LinearShape& s) {
  return {.T = s.T,
          .D = s.D,
          .O = s.O,
          .x = in_rows(p.x),
          .weight = p.weight.const_data_ptr(),
          .weight_stride = p.weight.stride(0),
          .bias = p.bias ? in_heads(*p.bias) : InRows(),
          .out = out_columns(p.out)};
}

// Tokens of the longest of N sequences of T, or more: what the host does not say may be one sequence.
int64_t max_len(const HostFacts& host, int64_t N, int64_t T) {
  if (!host.cu_seqlens) return T;
  const int32_t* const cu = host.cu_seqlens->const_data_ptr<int32_t>();
  int64_t longest = 0;
  for (int64_t n = 0; n < N; ++n) longest = std::max<int64_t>(longest, cu[n + 1] - cu[n]);
  return longest;
}

class CudaBackend final : public Backend {
 public:
  using Backend::is_batch_invariant;
  using Backend::run;
  using Backend::why_not;

  std::string_view name() const override { return "cuda"; }

  Sentence why_unavailable() const override {
    if (!c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) return "this torch was built without CUDA";
    if (c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).deviceCount() == 0) return "torch sees no CUDA device";
    return std::nullopt;
  }

  Sentence why_not_device(c10::Device device) const override {
    if (const Sentence none = why_unavailable()) return none;
    if (device.is_cuda()) return std::nullopt;
    return c10::str("it serves cuda tensors, these are on ", device.str());
  }

  bool copies_contexts() const override { return false; }
  bool finds_largest_logits() const override { return true; }
  LargestLogits largest_logits(const at::Tensor& logits) const override {
    const int64_t R = logits.size(0);
    const LargestLogits found{at::empty({2, R}, logits.options().dtype(at::kInt))};
    cuda::largest_logits({.R = R,
                          .V = logits.size(1),
                          .logits = logits.const_data_ptr<float>(),
                          .tokens = found.tokens().mutable_data_ptr<int32_t>(),
                          .largest = found.values().mutable_data_ptr<float>()},
                         current_stream(logits));
    return found;
  }
  at::Tensor likeliest_logits(const at::Tensor& logits, int64_t count) const override {
    static_assert(kMostLikeliest <= cuda::kMostFound);
    const int64_t R = logits.size(0);
    const at::Tensor found = at::empty({R, 2, count}, logits.options().dtype(at::kInt));
    cuda::likeliest_logits({.R = R,
                            .V = logits.size(1),
                            .count = count,
                            .logits = logits.const_data_ptr<float>(),
                            .found = found.mutable_data_ptr<int32_t>()},
                           current_stream(logits));
    return found;
  }
#ifdef XGDN_TORCH_HAS_CUDA
  bool has_graphs() const override {
    return true;
  }
  std::unique_ptr<DeviceGraph> record(const std::function<void()>& launches) const override {
    return cuda::record_graph(launches);
  }
#endif

  // ---- the delta rule -----------------------------------------------------------------------------------------------

  Sentence why_not(const RecurrentGatedDeltaRuleParams&, const GdnShape& s) const override {
    return why_not_key_dim(s.K);
  }
  Sentence why_not(const ChunkGatedDeltaRuleParams&, const GdnShape& s) const override {
    return why_not_key_dim(s.K);
  }
  Sentence why_not(const ReplayGatedDeltaRuleParams& p, const ReplayShape& s) const override {
    return why_not_replay(p, s);
  }
  Sentence why_not(const MaterializeStateParams& p, const ReplayShape& s) const override {
    return why_not_replay(p, s);
  }
  Sentence why_not(const PackedDecodeParams&, const GdnShape& s) const override {
    return why_not_key_dim(s.K);
  }
  Sentence why_not(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    return p.ring ? aten::why_not_decode_step(*this, p, s) : why_not_key_dim(s.rule.K);
  }

  // A sequence's sums do not depend on the grid, and where it is cut depends on itself, the heads and the device.
  bool is_batch_invariant(const RecurrentGatedDeltaRuleParams&, const GdnShape&) const override {
    return true;
  }
  bool is_batch_invariant(const ChunkGatedDeltaRuleParams&, const GdnShape&) const override {
    return true;
  }
  bool is_batch_invariant(const ReplayGatedDeltaRuleParams&, const ReplayShape&) const override {
    return true;
  }
  bool is_batch_invariant(const MaterializeStateParams&, const ReplayShape&) const override {
    return true;
  }
  bool is_batch_invariant(const PackedDecodeParams&, const GdnShape&) const override {
    return true;
  }
  bool is_batch_invariant(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    return has_decode_step(op_args(p, s));
  }

  void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    run_recurrent({op_args(p, s)}, s, p.q, p.k);
  }

  // "exact" is the rule token by token.
  void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override {
    const bool* const has_initial_state = pointer<bool>(p.has_initial_state);
    if (!may_be_fast(p) || !cuda::chunk_supports(s.K, s.V)) {
      return run_recurrent({{delta_rule_args(p, s)}, has_initial_state}, s, p.q, p.k);
    }
    const at::Tensor q = with_aligned_rows(p.q), k = with_aligned_rows(p.k), v = with_aligned_rows(p.v);
    cuda::ChunkGatedDeltaRuleArgs args = {delta_rule_args(p, s)};
    args.q = in_rows(q);
    args.k = in_rows(k);
    args.v = in_rows(v);
    args.has_initial_state = has_initial_state;
    args.ends = args.cu_seqlens + 1;
    args.T = v.size(0);
    args.M = p.chunk_indices.size(0);
    args.max_len = max_len(p.host, s.N, args.T);
    args.chunk_indices = p.chunk_indices.const_data_ptr<int32_t>();
    args.chunk_offsets = p.chunk_offsets.const_data_ptr<int32_t>();
    const at::Tensor memory = scratch(cuda::workspace_bytes(args), q);
    args.workspace = memory.mutable_data_ptr();
    cuda::chunk_gated_delta_rule(args, current_stream(q));
  }

  void run(const ReplayGatedDeltaRuleParams& p, const ReplayShape& s) const override {
    cuda::ReplayPromptArgs args = {op_args(p, s)};
    const at::Tensor q = with_aligned_rows(p.q), k = with_aligned_rows(p.k);
    args.q = in_rows(q);
    args.k = in_rows(k);
    args.T = s.rule.T;
    args.max_len = max_len(p.host, s.rule.N, s.rule.T);
    if (!may_be_fast(p) || !cuda::replay_prompt_supports(args)) {
      return cuda::replay_gated_delta_rule({args, args.cu_seqlens + 1}, s.rule.T, current_stream(q));
    }
    const at::Tensor v = with_aligned_rows(p.v);
    args.v = in_rows(v);
    const at::Tensor memory = scratch(cuda::workspace_bytes(args), q);
    args.workspace = memory.mutable_data_ptr();
    cuda::replay_prompt(args, current_stream(q));
  }
  void run(const MaterializeStateParams& p, const ReplayShape& s) const override {
    cuda::materialize_state(op_args(p, s), p.lengths.const_data_ptr<int32_t>(), current_stream(p.state));
  }

  void run(const PackedDecodeParams& p, const GdnShape& s) const override {
    cuda::RecurrentGatedDeltaRuleArgs args = {op_args(p, s)};
    const at::Tensor row = is_aligned(args.q) && is_aligned(args.k) ? p.mixed_qkv : p.mixed_qkv.contiguous();
    args.q = in_columns(row, 0, s.K);
    args.k = in_columns(row, s.H * s.K, s.K);
    args.v = in_columns(row, 2 * s.H * s.K, s.V);
    args.T = s.T;
    args.num_slots = s.S;
    cuda::recurrent_gated_delta_rule(args, current_stream(row));
  }

  void run(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    const DecodeStepArgs args = op_args(p, s);
    if (!has_decode_step(args)) return aten::gdn_decode_step(*this, p, s);
    cuda::gdn_decode_step(args, s.rule.S, s.conv.S, current_stream(p.projected));
  }

  void run(const GdnGatingParams& p, const GdnShape& s) const override {
    cuda::gdn_gating(op_args(p, s), s.T, current_stream(p.a));
  }

  // ---- around it ----------------------------------------------------------------------------------------------------

  void run(const CausalConv1dParams& p, const ConvShape& s) const override {
    cuda::causal_conv1d(op_args(p, s), s.T, current_stream(p.x));
  }
  void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const override {
    cuda::causal_conv1d_update(op_args(p, s), current_stream(p.x));
  }
  void run(const L2NormParams& p, const GdnShape&) const override {
    aten::l2_norm(p);
  }
  void run(const RmsNormGatedParams& p, const GdnShape& s) const override {
    cuda::rms_norm_gated(op_args(p, s), s.T, current_stream(p.x));
  }
  void run(const RmsNormParams& p, const NormShape& s) const override {
    if (s.D > cuda::kMaxNormedDim) return aten::rms_norm(p);
    cuda::rms_norm(op_args(p, s), s.T, current_stream(p.x));
  }
  void run(const SiluAndMulParams& p, const LinearShape& s) const override {
    cuda::silu_and_mul(op_args(p, s), s.T, current_stream(p.gate));
  }
  void run(const SigmoidAndMulParams& p, const NormShape& s) const override {
    cuda::sigmoid_and_mul(op_args(p, s), s.T, current_stream(p.x));
  }
  void run(const LinearParams& p, const LinearShape& s) const override {
    cuda::LinearArgs args = linear_args(p, s);
    args.has_constant_weight = p.has_constant_weight;
    if (cuda::linear_supports(args)) return cuda::linear(args, current_stream(p.x));
    if (p.out.scalar_type() == p.x.scalar_type()) return aten::linear(p);
    at::Tensor out = p.out;
    out.copy_(at::mm(p.x, p.weight.t(), out.scalar_type()));  // rounded once
    if (p.bias) out.add_(*p.bias);
  }
  void run(const QuantizedLinearParams& p, const QuantizedLinearShape&) const override {
    aten::quantized_linear(p);
  }
  void run(const RmsNormLinearParams& p, const LinearShape& s) const override {
    cuda::LinearArgs args = linear_args(p, s);
    args.has_constant_weight = true;
    args.norm_weight = in_heads(p.norm_weight);
    args.residual = p.residual ? in_rows(*p.residual) : InRows();
    args.residual_out = p.residual_out ? out_rows(*p.residual_out) : OutRows();
    args.eps = static_cast<float>(p.eps);
    args.silu_and_mul = p.use_silu_and_mul;
    if (cuda::linear_supports(args)) return cuda::linear(args, current_stream(p.x));
    if (s.D > cuda::kMaxNormedDim) return aten::rms_norm_linear(*this, p, s);
    const at::Tensor normed = at::empty({s.T, s.D}, p.x.options());
    cuda::rms_norm(norm_args(p, s, normed), s.T, current_stream(p.x));
    args.x = in_rows(normed);
    args.norm_weight = args.residual = InRows();
    if (cuda::linear_supports(args)) return cuda::linear(args, current_stream(p.x));
    aten::linear_of_normed(*this, p, s, normed);
  }

  // ---- attention ----------------------------------------------------------------------------------------------------

  Sentence why_not(const PagedAttentionParams&, const AttentionShape& s) const override {
    if (s.D % 8 == 0 && s.D <= 256) return std::nullopt;
    return c10::str("its kernels are for heads of a multiple of 8, at most 256, got D=", s.D);
  }

  void run(const PagedAttentionParams& p, const AttentionShape& s) const override {
    cuda::PagedAttentionArgs args = {.T = s.T,
                                     .N = s.N,
                                     .M = p.block_table.size(1),
                                     .HQ = s.HQ,
                                     .HKV = s.HKV,
                                     .D = s.D,
                                     .B = p.k.size(1),
                                     .max_len = max_len(p.host, s.N, s.T),
                                     .q = in_rows(p.q),
                                     .are_int8 = p.k.scalar_type() == at::kChar,
                                     .k = p.k.const_data_ptr(),
                                     .v = p.v.const_data_ptr(),
                                     .block_table = p.block_table.const_data_ptr<int32_t>(),
                                     .block_table_stride = p.block_table.stride(0),
                                     .context_lens = p.context_lens.const_data_ptr<int32_t>(),
                                     .cu_seqlens = p.cu_seqlens.const_data_ptr<int32_t>(),
                                     .out = out_rows(p.out),
                                     .scale = static_cast<float>(p.scale.value_or(1.0 / std::sqrt(s.D)))};
    const at::Tensor memory = scratch(cuda::workspace_bytes(args), p.q);
    args.workspace = memory.mutable_data_ptr();
    cuda::paged_attention(args, current_stream(p.q));
  }

  void run(const StoreKvParams& p, const KvShape& s) const override {
    cuda::store_kv({.T = s.T,
                    .HKV = s.HKV,
                    .D = s.D,
                    .k = in_rows(p.k),
                    .v = in_rows(p.v),
                    .are_int8 = p.k_cache.scalar_type() == at::kChar,
                    .k_cache = p.k_cache.mutable_data_ptr(),
                    .v_cache = p.v_cache.mutable_data_ptr(),
                    .rows = p.slot_mapping.const_data_ptr<int32_t>()},
                   current_stream(p.k));
  }

  void run(const CopySlotsParams& p, const SlotsShape& s) const override {
    aten::copy_slots(p, s);
  }

  // ---- experts ------------------------------------------------------------------------------------------------------

  void run(const MoeExpertsParams& p, const ExpertsShape& s) const override {
    const at::Tensor x = with_aligned_rows(p.x);
    cuda::MoeExpertsArgs args = {.T = s.T,
                                 .A = s.A,
                                 .E = s.E,
                                 .D = s.D,
                                 .I = s.I,
                                 .x = in_rows(x),
                                 .weights = in_scalars(p.weights),
                                 .chosen = p.chosen.const_data_ptr<int64_t>(),
                                 .gate_up = p.gate_up.const_data_ptr(),
                                 .down = p.down.const_data_ptr(),
                                 .out = out_rows(p.out)};
    if (!cuda::moe_experts_supports(args)) return aten::moe_experts(p, s);
    const at::Tensor memory = scratch(cuda::workspace_bytes(args), x);
    args.workspace = memory.mutable_data_ptr();
    cuda::moe_experts(args, current_stream(x));
  }
  void run(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) const override {
    run(aten::with_plain_weights(p, s), s.experts);
  }
};

}  // namespace

const Backend* cuda_backend() {
  static const CudaBackend backend;
  return &backend;
}

}  // namespace xgdn::kernel
