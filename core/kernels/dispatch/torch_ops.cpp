// SPDX-License-Identifier: Apache-2.0
// The ops as PyTorch operators, torch.ops.xgdn.*: schemas with the mutated arguments annotated, and implementations for
// CPU, CUDA, PrivateUse1 (npu), Meta and Autograd, for every op of the list.
//
// No operator returns a tensor, so that none ever aliases an argument: Python allocates `out`, and the Meta kernels
// only run the checks, on symbolic sizes too.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/kernels/op_list.h"

namespace xgdn::kernel {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where a call arrives. Index values can be read for free only where the tensors are on the host.
enum class Key { kHost, kDevice, kMeta };

// Runs `body` and turns xgdn's errors into those that PyTorch shows as Python built-ins, without C++ frames.
template <typename Body>
auto with_torch_errors(const Body& body) {
  try {
    return body();
  } catch (const DtypeError& e) {
    TORCH_CHECK_TYPE(false, e.what());
  } catch (const RangeError& e) {
    TORCH_CHECK_INDEX(false, e.what());
  } catch (const UnsupportedError& e) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, e.what());
  } catch (const ShapeError& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const DeviceError& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const MissingMetadataError& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const RequestError& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const Error& e) {
    TORCH_CHECK(false, e.what());
  }
}

// An op of PyTorch: its schema, whose name is the op's, and the parameters that its arguments make.
template <class Params>
struct TorchOp;

template <>
struct TorchOp<RecurrentGatedDeltaRuleParams> {
  static constexpr const char* schema =
      "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor cu_seqlens, "
      "Tensor state_indices, Tensor(b!) out, *, Tensor? write_indices=None, Tensor? num_accepted=None, "
      "Tensor? cu_seqlens_cpu=None, bool may_have_padding=True, float? scale=None, "
      "bool use_qk_l2norm_in_kernel=True, str backend=\"auto\") -> ()";
  static RecurrentGatedDeltaRuleParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                              const Tensor& beta, const Tensor& state, const Tensor& cu_seqlens,
                                              const Tensor& state_indices, const Tensor& out,
                                              const MaybeTensor& write_indices, const MaybeTensor& num_accepted,
                                              const MaybeTensor& cu_seqlens_cpu, bool may_have_padding,
                                              std::optional<double> scale, bool use_qk_l2norm_in_kernel,
                                              std::string backend) {
    return {.q = q,
            .k = k,
            .v = v,
            .g = g,
            .beta = beta,
            .state = state,
            .cu_seqlens = cu_seqlens,
            .state_indices = state_indices,
            .out = out,
            .write_indices = write_indices,
            .num_accepted = num_accepted,
            .host = {.cu_seqlens = cu_seqlens_cpu, .may_have_padding = may_have_padding},
            .scale = scale,
            .use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<ChunkGatedDeltaRuleParams> {
  static constexpr const char* schema =
      "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor cu_seqlens, "
      "Tensor state_indices, Tensor? chunk_indices, Tensor? chunk_offsets, Tensor(b!) out, *, "
      "Tensor? has_initial_state=None, Tensor? write_indices=None, Tensor? cu_seqlens_cpu=None, "
      "bool may_have_padding=True, float? scale=None, bool use_qk_l2norm_in_kernel=True, str accuracy=\"auto\", "
      "str backend=\"auto\") -> ()";
  static ChunkGatedDeltaRuleParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                                          const Tensor& beta, const Tensor& state, const Tensor& cu_seqlens,
                                          const Tensor& state_indices, const MaybeTensor& chunk_indices,
                                          const MaybeTensor& chunk_offsets, const Tensor& out,
                                          const MaybeTensor& has_initial_state, const MaybeTensor& write_indices,
                                          const MaybeTensor& cu_seqlens_cpu, bool may_have_padding,
                                          std::optional<double> scale, bool use_qk_l2norm_in_kernel,
                                          std::string accuracy, std::string backend) {
    return {.q = q,
            .k = k,
            .v = v,
            .g = g,
            .beta = beta,
            .state = state,
            .cu_seqlens = cu_seqlens,
            .state_indices = state_indices,
            .chunk_indices = chunk_indices.value_or(Tensor()),
            .chunk_offsets = chunk_offsets.value_or(Tensor()),
            .out = out,
            .has_initial_state = has_initial_state,
            .write_indices = write_indices,
            .host = {.cu_seqlens = cu_seqlens_cpu, .may_have_padding = may_have_padding},
            .scale = scale,
            .use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel,
            .accuracy = std::move(accuracy),
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<ReplayGatedDeltaRuleParams> {
  static constexpr const char* schema =
      "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor(b!) ring_k, Tensor(c!) ring_u, "
      "Tensor(d!) ring_g, Tensor(e!) ring_length, Tensor cu_seqlens, Tensor state_indices, Tensor ring_indices, "
      "Tensor(f!) out, *, Tensor? write_indices=None, Tensor? ring_write_indices=None, Tensor? num_accepted=None, "
      "Tensor? has_initial_state=None, Tensor? cu_seqlens_cpu=None, int chunk_size=16, bool commit=True, "
      "float? scale=None, bool use_qk_l2norm_in_kernel=True, str accuracy=\"exact\", str backend=\"auto\") -> ()";
  static ReplayGatedDeltaRuleParams params(
      const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta, const Tensor& state,
      const Tensor& ring_k, const Tensor& ring_u, const Tensor& ring_g, const Tensor& ring_length,
      const Tensor& cu_seqlens, const Tensor& state_indices, const Tensor& ring_indices, const Tensor& out,
      const MaybeTensor& write_indices, const MaybeTensor& ring_write_indices, const MaybeTensor& num_accepted,
      const MaybeTensor& has_initial_state, const MaybeTensor& cu_seqlens_cpu, int64_t chunk_size, bool commit,
      std::optional<double> scale, bool use_qk_l2norm_in_kernel, std::string accuracy, std::string backend) {
    return {.q = q,
            .k = k,
            .v = v,
            .g = g,
            .beta = beta,
            .state = state,
            .ring = {.k = ring_k, .u = ring_u, .g = ring_g, .length = ring_length},
            .cu_seqlens = cu_seqlens,
            .state_indices = state_indices,
            .ring_indices = ring_indices,
            .out = out,
            .write_indices = write_indices,
            .ring_write_indices = ring_write_indices,
            .num_accepted = num_accepted,
            .has_initial_state = has_initial_state,
            .host = {.cu_seqlens = cu_seqlens_cpu},
            .chunk_size = chunk_size,
            .commit = commit,
            .scale = scale,
            .use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel,
            .accuracy = std::move(accuracy),
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<MaterializeStateParams> {
  static constexpr const char* schema =
      "(Tensor(a!) state, Tensor ring_k, Tensor ring_u, Tensor ring_g, Tensor ring_length, Tensor lengths, "
      "Tensor state_indices, Tensor ring_indices, Tensor write_indices, *, int chunk_size=16, str backend=\"auto\") "
      "-> ()";
  static MaterializeStateParams params(const Tensor& state, const Tensor& ring_k, const Tensor& ring_u,
                                       const Tensor& ring_g, const Tensor& ring_length, const Tensor& lengths,
                                       const Tensor& state_indices, const Tensor& ring_indices,
                                       const Tensor& write_indices, int64_t chunk_size, std::string backend) {
    return {.state = state,
            .ring = {.k = ring_k, .u = ring_u, .g = ring_g, .length = ring_length},
            .lengths = lengths,
            .state_indices = state_indices,
            .ring_indices = ring_indices,
            .write_indices = write_indices,
            .chunk_size = chunk_size,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<PackedDecodeParams> {
  static constexpr const char* schema =
      "(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, "
      "Tensor state_indices, Tensor(b!) out, *, Tensor? write_indices=None, bool may_have_padding=True, "
      "float? scale=None, bool use_qk_l2norm_in_kernel=True, str backend=\"auto\") -> ()";
  static PackedDecodeParams params(const Tensor& mixed_qkv, const Tensor& a, const Tensor& b, const Tensor& A_log,
                                   const Tensor& dt_bias, const Tensor& state, const Tensor& state_indices,
                                   const Tensor& out, const MaybeTensor& write_indices, bool may_have_padding,
                                   std::optional<double> scale, bool use_qk_l2norm_in_kernel, std::string backend) {
    return {.mixed_qkv = mixed_qkv,
            .a = a,
            .b = b,
            .A_log = A_log,
            .dt_bias = dt_bias,
            .state = state,
            .state_indices = state_indices,
            .out = out,
            .write_indices = write_indices,
            .host = {.may_have_padding = may_have_padding},
            .scale = scale,
            .use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<CausalConv1dParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor(a!) conv_state, Tensor cu_seqlens, Tensor state_indices, Tensor(b!) out, "
      "*, Tensor? bias=None, Tensor? has_initial_state=None, Tensor? write_indices=None, bool silu=True, "
      "str backend=\"auto\") -> ()";
  static CausalConv1dParams params(const Tensor& x, const Tensor& weight, const Tensor& conv_state,
                                   const Tensor& cu_seqlens, const Tensor& state_indices, const Tensor& out,
                                   const MaybeTensor& bias, const MaybeTensor& has_initial_state,
                                   const MaybeTensor& write_indices, bool silu, std::string backend) {
    return {.x = x,
            .weight = weight,
            .conv_state = conv_state,
            .cu_seqlens = cu_seqlens,
            .state_indices = state_indices,
            .out = out,
            .bias = bias,
            .has_initial_state = has_initial_state,
            .write_indices = write_indices,
            .silu = silu,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<CausalConv1dUpdateParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor(a!) conv_state, Tensor cu_seqlens, Tensor state_indices, Tensor(b!) out, "
      "*, int max_len=1, Tensor? bias=None, Tensor? write_indices=None, Tensor? num_accepted=None, "
      "bool may_have_padding=True, bool silu=True, str backend=\"auto\") -> ()";
  static CausalConv1dUpdateParams params(const Tensor& x, const Tensor& weight, const Tensor& conv_state,
                                         const Tensor& cu_seqlens, const Tensor& state_indices, const Tensor& out,
                                         int64_t max_len, const MaybeTensor& bias, const MaybeTensor& write_indices,
                                         const MaybeTensor& num_accepted, bool may_have_padding, bool silu,
                                         std::string backend) {
    return {.x = x,
            .weight = weight,
            .conv_state = conv_state,
            .cu_seqlens = cu_seqlens,
            .state_indices = state_indices,
            .out = out,
            .host = {.max_len = max_len, .may_have_padding = may_have_padding},
            .bias = bias,
            .write_indices = write_indices,
            .num_accepted = num_accepted,
            .silu = silu,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<GdnGatingParams> {
  static constexpr const char* schema =
      "(Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) g, Tensor(b!) beta, *, str backend=\"auto\") "
      "-> ()";
  static GdnGatingParams params(const Tensor& a, const Tensor& b, const Tensor& A_log, const Tensor& dt_bias,
                                const Tensor& g, const Tensor& beta, std::string backend) {
    return {.a = a, .b = b, .A_log = A_log, .dt_bias = dt_bias, .g = g, .beta = beta, .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<L2NormParams> {
  static constexpr const char* schema = "(Tensor x, Tensor(a!) out, *, float eps=1e-6, str backend=\"auto\") -> ()";
  static L2NormParams params(const Tensor& x, const Tensor& out, double eps, std::string backend) {
    return {.x = x, .out = out, .eps = eps, .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<RmsNormGatedParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor z, Tensor weight, Tensor(a!) out, *, float eps=1e-6, str backend=\"auto\") -> ()";
  static RmsNormGatedParams params(const Tensor& x, const Tensor& z, const Tensor& weight, const Tensor& out,
                                   double eps, std::string backend) {
    return {.x = x, .z = z, .weight = weight, .out = out, .eps = eps, .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<PagedAttentionParams> {
  static constexpr const char* schema =
      "(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor context_lens, Tensor cu_seqlens, Tensor(a!) out, *, "
      "Tensor? context_rows=None, Tensor? cu_seqlens_cpu=None, Tensor? context_lens_cpu=None, float? scale=None, "
      "str backend=\"auto\") -> ()";
  static PagedAttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_table,
                                     const Tensor& context_lens, const Tensor& cu_seqlens, const Tensor& out,
                                     const MaybeTensor& context_rows, const MaybeTensor& cu_seqlens_cpu,
                                     const MaybeTensor& context_lens_cpu, std::optional<double> scale,
                                     std::string backend) {
    return {.q = q,
            .k = k,
            .v = v,
            .block_table = block_table,
            .context_lens = context_lens,
            .cu_seqlens = cu_seqlens,
            .out = out,
            .context_rows = context_rows,
            .host = {.cu_seqlens = cu_seqlens_cpu, .context_lens = context_lens_cpu},
            .scale = scale,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<StoreKvParams> {
  static constexpr const char* schema =
      "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, *, "
      "bool may_have_padding=True, str backend=\"auto\") -> ()";
  static StoreKvParams params(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                              const Tensor& slot_mapping, bool may_have_padding, std::string backend) {
    return {.k = k,
            .v = v,
            .k_cache = k_cache,
            .v_cache = v_cache,
            .slot_mapping = slot_mapping,
            .host = {.may_have_padding = may_have_padding},
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<CopySlotsParams> {
  static constexpr const char* schema =
      "(Tensor(a!)[] pools, Tensor from_indices, Tensor to_indices, *, bool may_have_padding=True, "
      "str backend=\"auto\") -> ()";
  static CopySlotsParams params(at::TensorList pools, const Tensor& from_indices, const Tensor& to_indices,
                                bool may_have_padding, std::string backend) {
    return {.pools = pools.vec(),
            .from_indices = from_indices,
            .to_indices = to_indices,
            .host = {.may_have_padding = may_have_padding},
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<RmsNormParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor(a!) out, *, Tensor(b!)? residual=None, Tensor? cos=None, "
      "Tensor? sin=None, float eps=1e-6, str backend=\"auto\") -> ()";
  static RmsNormParams params(const Tensor& x, const Tensor& weight, const Tensor& out, const MaybeTensor& residual,
                              const MaybeTensor& cos, const MaybeTensor& sin, double eps, std::string backend) {
    return {.x = x,
            .weight = weight,
            .out = out,
            .residual = residual,
            .cos = cos,
            .sin = sin,
            .eps = eps,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<SiluAndMulParams> {
  static constexpr const char* schema = "(Tensor gate, Tensor up, Tensor(a!) out, *, str backend=\"auto\") -> ()";
  static SiluAndMulParams params(const Tensor& gate, const Tensor& up, const Tensor& out, std::string backend) {
    return {.gate = gate, .up = up, .out = out, .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<SigmoidAndMulParams> {
  static constexpr const char* schema = "(Tensor x, Tensor gate, Tensor(a!) out, *, str backend=\"auto\") -> ()";
  static SigmoidAndMulParams params(const Tensor& x, const Tensor& gate, const Tensor& out, std::string backend) {
    return {.x = x, .gate = gate, .out = out, .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<LinearParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor(a!) out, *, Tensor? bias=None, bool has_constant_weight=False, "
      "str backend=\"auto\") -> ()";
  static LinearParams params(const Tensor& x, const Tensor& weight, const Tensor& out, const MaybeTensor& bias,
                             bool has_constant_weight, std::string backend) {
    return {.x = x,
            .weight = weight,
            .out = out,
            .bias = bias,
            .has_constant_weight = has_constant_weight,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<RmsNormLinearParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor norm_weight, Tensor weight, Tensor(a!) out, *, Tensor? bias=None, Tensor? residual=None, "
      "Tensor(b!)? residual_out=None, bool use_silu_and_mul=False, float eps=1e-6, str backend=\"auto\") -> ()";
  static RmsNormLinearParams params(const Tensor& x, const Tensor& norm_weight, const Tensor& weight, const Tensor& out,
                                    const MaybeTensor& bias, const MaybeTensor& residual,
                                    const MaybeTensor& residual_out, bool use_silu_and_mul, double eps,
                                    std::string backend) {
    return {.x = x,
            .norm_weight = norm_weight,
            .weight = weight,
            .out = out,
            .bias = bias,
            .residual = residual,
            .residual_out = residual_out,
            .use_silu_and_mul = use_silu_and_mul,
            .eps = eps,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<QuantizedLinearParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor codes, Tensor scales, Tensor(a!) out, *, Tensor? zeros=None, Tensor? order=None, "
      "Tensor? bias=None, int activation_bits=16, str backend=\"auto\") -> ()";
  static QuantizedLinearParams params(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& out,
                                      const MaybeTensor& zeros, const MaybeTensor& order, const MaybeTensor& bias,
                                      int64_t activation_bits, std::string backend) {
    return {.x = x,
            .weight =
                {.codes = codes, .scales = scales, .zeros = zeros, .order = order, .activation_bits = activation_bits},
            .out = out,
            .bias = bias,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<QuantizedMoeExpertsParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weights, Tensor chosen, Tensor gate_up_codes, Tensor gate_up_scales, Tensor down_codes, "
      "Tensor down_scales, Tensor(a!) out, *, Tensor? gate_up_zeros=None, Tensor? down_zeros=None, "
      "int activation_bits=16, str backend=\"auto\") -> ()";
  static QuantizedMoeExpertsParams params(const Tensor& x, const Tensor& weights, const Tensor& chosen,
                                          const Tensor& gate_up_codes, const Tensor& gate_up_scales,
                                          const Tensor& down_codes, const Tensor& down_scales, const Tensor& out,
                                          const MaybeTensor& gate_up_zeros, const MaybeTensor& down_zeros,
                                          int64_t activation_bits, std::string backend) {
    return {
        .x = x,
        .weights = weights,
        .chosen = chosen,
        .gate_up = {.codes = gate_up_codes,
                    .scales = gate_up_scales,
                    .zeros = gate_up_zeros,
                    .activation_bits = activation_bits},
        .down = {.codes = down_codes, .scales = down_scales, .zeros = down_zeros, .activation_bits = activation_bits},
        .out = out,
        .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<MoeExpertsParams> {
  static constexpr const char* schema =
      "(Tensor x, Tensor weights, Tensor chosen, Tensor gate_up, Tensor down, Tensor(a!) out, *, "
      "str backend=\"auto\") -> ()";
  static MoeExpertsParams params(const Tensor& x, const Tensor& weights, const Tensor& chosen, const Tensor& gate_up,
                                 const Tensor& down, const Tensor& out, std::string backend) {
    return {.x = x,
            .weights = weights,
            .chosen = chosen,
            .gate_up = gate_up,
            .down = down,
            .out = out,
            .backend = std::move(backend)};
  }
};

template <>
struct TorchOp<GdnDecodeStepParams> {
  static constexpr const char* schema =
      "(Tensor projected, Tensor conv_weight, Tensor(a!) conv_state, Tensor A_log, Tensor dt_bias, "
      "Tensor(b!) state, Tensor norm_weight, Tensor state_indices, Tensor(c!) out, *, Tensor? conv_bias=None, "
      "Tensor? write_indices=None, Tensor? conv_indices=None, Tensor? conv_write_indices=None, "
      "Tensor(d!)? ring_k=None, Tensor(e!)? ring_u=None, Tensor(f!)? ring_g=None, Tensor(g!)? ring_length=None, "
      "int chunk_size=16, Tensor? cu_seqlens=None, bool may_have_padding=True, float norm_eps=1e-6, "
      "float? scale=None, str backend=\"auto\") -> ()";
  static GdnDecodeStepParams params(const Tensor& projected, const Tensor& conv_weight, const Tensor& conv_state,
                                    const Tensor& A_log, const Tensor& dt_bias, const Tensor& state,
                                    const Tensor& norm_weight, const Tensor& state_indices, const Tensor& out,
                                    const MaybeTensor& conv_bias, const MaybeTensor& write_indices,
                                    const MaybeTensor& conv_indices, const MaybeTensor& conv_write_indices,
                                    const MaybeTensor& ring_k, const MaybeTensor& ring_u, const MaybeTensor& ring_g,
                                    const MaybeTensor& ring_length, int64_t chunk_size, const MaybeTensor& cu_seqlens,
                                    bool may_have_padding, double norm_eps, std::optional<double> scale,
                                    std::string backend) {
    std::optional<SlotIndices> conv_slots;
    if (conv_indices || conv_write_indices) {
      conv_slots = {.read = conv_indices.value_or(state_indices), .write = conv_write_indices};
    }
    std::optional<ReplayRing> ring;  // all of it or nothing: the checks miss what is not there
    if (ring_k || ring_u || ring_g || ring_length) {
      ring = {.k = ring_k.value_or(Tensor()),
              .u = ring_u.value_or(Tensor()),
              .g = ring_g.value_or(Tensor()),
              .length = ring_length.value_or(Tensor())};
    }
    return {.projected = projected,
            .conv_weight = conv_weight,
            .conv_state = conv_state,
            .A_log = A_log,
            .dt_bias = dt_bias,
            .state = state,
            .norm_weight = norm_weight,
            .state_indices = state_indices,
            .out = out,
            .conv_bias = conv_bias,
            .write_indices = write_indices,
            .conv_slots = std::move(conv_slots),
            .ring = std::move(ring),
            .chunk_size = chunk_size,
            .cu_seqlens = cu_seqlens,
            .host = {.may_have_padding = may_have_padding},
            .norm_eps = norm_eps,
            .scale = scale,
            .backend = std::move(backend)};
  }
};

// Its kernel.
template <Key key, class Params, class Make = decltype(TorchOp<Params>::params)>
struct Kernel;
template <Key key, class Params, class... Arguments>
struct Kernel<key, Params, Params(Arguments...)> {
  static void call(Arguments... arguments) {
    with_torch_errors([&] {
      const Params p = TorchOp<Params>::params(std::forward<Arguments>(arguments)...);
      if constexpr (key == Key::kMeta) {
        check(p);
      } else {
        if constexpr (key == Key::kHost && requires { check_indices(p); }) check_indices(p);
        if constexpr (key == Key::kDevice && requires { check_host_facts(p); }) check_host_facts(p);
        Op<Params>::call(p);
      }
    });
  }
};

template <Key key>
void implement(torch::Library& m) {
  for_each_op(
      [&]<class Params>(std::type_identity<Params>) { m.impl(Op<Params>::name.data(), Kernel<key, Params>::call); });
}

// Calls f(tensor, place) for each tensor of an argument: one, none, or those of a list, at the places "[0]", "[1]", ...
template <class F>
void for_each_tensor(const c10::IValue& argument, const F& f) {
  if (argument.isTensor()) {
    if (argument.toTensor().defined()) f(argument.toTensor(), std::string());
  } else if (argument.isTensorList()) {
    size_t index = 0;
    for (const Tensor& t : argument.toTensorVector()) f(t, c10::str("[", index++, "]"));
  }
}

// The ops have no derivative: an input that wants one is an error, never a silent detach. Otherwise marks the written
// arguments as changed, which is what autograd's own kernels do for in-place ops, and goes on below autograd.
void refuse_gradients(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(*stack, arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    for_each_tensor(values[i], [&](const Tensor& t, const std::string& place) {
      TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !t.requires_grad(), "[", op.operator_name().name, "] ",
                                  arguments[i].name(), place,
                                  ": requires grad, but xgdn's ops are for inference and have no derivative; call it "
                                  "under torch.no_grad() or pass ",
                                  arguments[i].name(), place, ".detach()");
    });
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    for_each_tensor(values[i], [](const Tensor& t, const std::string&) {
      if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    });
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

Phase phase_named(const std::string& name) {
  if (name == "prefill") return Phase::kPrefill;
  if (name == "decode") return Phase::kDecode;
  throw UnsupportedError("phase: expected prefill or decode, got " + name);
}

std::vector<Tensor> build_chunk_metadata_op(at::IntArrayRef lengths, int64_t num_v_heads_local, bool compact_ranks,
                                            std::optional<c10::Device> device) {
  return with_torch_errors([&] {
    const ChunkMetadata m = build_chunk_metadata(lengths.vec(), num_v_heads_local,
                                                 compact_ranks ? SequenceIds::kCompactRanks : SequenceIds::kTrue,
                                                 device.value_or(c10::kCPU));
    // An operator's results may not share storage; the arena that these are views of stays behind.
    return std::vector<Tensor>{m.chunk_indices_chunk64.clone(),        m.chunk_offsets_chunk64.clone(),
                               m.update_chunk_offsets_chunk64.clone(), m.final_chunk_indices_chunk64.clone(),
                               m.chunk_indices_large_block.clone(),    m.block_indices_cumsum.clone()};
  });
}

}  // namespace

TORCH_LIBRARY(xgdn, m) {
  m.set_python_module("xgdn.ops");
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  for_each_op([&]<class Params>(std::type_identity<Params>) {
    m.def((std::string(Op<Params>::name) + TorchOp<Params>::schema).c_str(), tags);
  });

  // Without tensor arguments there is no key to choose by: one implementation serves all. The fake implementation of
  // build_chunk_metadata is in python/xgdn/ops.py.
  m.def(
      "build_chunk_metadata(int[] lengths, int num_v_heads_local=1, bool compact_ranks=False, *, "
      "Device? device=None) -> Tensor[]",
      tags);
  m.impl("build_chunk_metadata", c10::DispatchKey::CompositeExplicitAutograd, build_chunk_metadata_op);
  m.def("set_default_backend(str phase, str name) -> ()", [](const std::string& phase, const std::string& name) {
    with_torch_errors([&] { set_default_backend(phase_named(phase), name); });
  });
  m.def("default_backend(str phase) -> str", [](const std::string& phase) {
    return with_torch_errors([&] { return default_backend(phase_named(phase)); });
  });
  m.def("available_backends() -> str[]", [] { return with_torch_errors([] { return available_backends(); }); });
  m.def("last_backend(str op) -> str",
        [](const std::string& op) { return with_torch_errors([&] { return last_backend(op); }); });
  m.def("last_is_batch_invariant(str op) -> bool",
        [](const std::string& op) { return with_torch_errors([&] { return last_is_batch_invariant(op); }); });
}

TORCH_LIBRARY_IMPL(xgdn, CPU, m) {
  implement<Key::kHost>(m);
}
TORCH_LIBRARY_IMPL(xgdn, CUDA, m) {
  implement<Key::kDevice>(m);
}
TORCH_LIBRARY_IMPL(xgdn, PrivateUse1, m) {
  implement<Key::kDevice>(m);
}
TORCH_LIBRARY_IMPL(xgdn, Meta, m) {
  implement<Key::kMeta>(m);
}

TORCH_LIBRARY_IMPL(xgdn, Autograd, m) {
  for_each_op([&]<class Params>(std::type_identity<Params>) {
    m.impl(Op<Params>::name.data(), torch::CppFunction::makeFromBoxedFunction<&refuse_gradients>());
  });
}

}  // namespace xgdn::kernel
