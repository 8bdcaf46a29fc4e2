// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "core/kernels/aten/indexing.h"
#include "core/kernels/npu/torch_npu_ops.h"
#include "core/kernels/ops_api.h"

namespace xgdn::kernel::npu {
namespace {

at::Tensor l2_normalised(const at::Tensor& x) {
  // x / sqrt(sum x^2 + eps) = K^-0.5 x / sqrt(mean x^2 + eps / K): an RMS norm, one launch.
  const int64_t K = x.size(-1);
  const double inverse_root = 1.0 / std::sqrt(static_cast<double>(K));
  return rms_norm(x, constant(inverse_root, K, x.options()), kL2NormEps / static_cast<double>(K));
}

}  // namespace

at::Tensor constant(double value, int64_t length, const at::TensorOptions& options) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, double, int64_t>, at::Tensor> rows;
  int64_t capacity = 1;
  while (capacity < length) capacity *= 2;
  const std::lock_guard lock(mutex);
  at::Tensor& row =
      rows[{options.device().index(), static_cast<int>(c10::typeMetaToScalarType(options.dtype())), value, capacity}];
  if (!row.defined()) row = at::full({capacity}, value, options);
  return row.narrow(0, 0, length);
}

std::vector<int64_t> lengths_of(const at::Tensor& cu_seqlens_cpu) {
  const int32_t* cu = cu_seqlens_cpu.const_data_ptr<int32_t>();
  std::vector<int64_t> lengths;
  for (int64_t n = 0; n + 1 < cu_seqlens_cpu.numel(); ++n) lengths.push_back(cu[n + 1] - cu[n]);
  return lengths;
}

at::Tensor masked(const at::Tensor& x, const at::Tensor& valid) {
  return at::where(aten::along(valid, x), x, at::zeros({}, x.options()));
}

Tokens Tokens::rows(const at::Tensor& index) const {
  return {q.index_select(0, index), k.index_select(0, index), v.index_select(0, index), g.index_select(0, index),
          beta.index_select(0, index)};
}

Tokens Tokens::without_padding(const at::Tensor& valid) const {
  return {masked(q, valid), masked(k, valid), masked(v, valid), masked(g, valid), masked(beta, valid)};
}

Tokens tokens_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                 const at::Tensor& beta, bool normalise_qk) {
  const auto key = [&](const at::Tensor& t) { return normalise_qk ? l2_normalised(t) : t.contiguous(); };
  return {key(q), key(k), v.contiguous(), g.contiguous(), beta.to(at::kBFloat16).contiguous()};
}

double scale_of(const std::optional<double>& scale, int64_t K) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(K)));
}

at::Tensor device_indices(const std::vector<int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, at::kLong).to(like.device());
}

Sentence why_not_dtype(const at::Tensor& in, const at::Tensor& state, const std::string& why_not_f32) {
  if (in.scalar_type() != at::kBFloat16) {
    return c10::str("it takes bf16 q, k and v, got ", c10::toString(in.scalar_type()));
  }
  if (state.scalar_type() == at::kFloat && !why_not_f32.empty()) {
    return c10::str("this CANN takes bf16 states, got a Float pool, which is never downcast (", why_not_f32, ")");
  }
  if (!state.is_contiguous()) return "it takes a contiguous pool, got one with a slot stride";
  return std::nullopt;
}

Sentence why_not_lengths(const std::optional<at::Tensor>& cu_seqlens_cpu) {
  if (cu_seqlens_cpu) return std::nullopt;
  return c10::str("its ops limit the length of a sequence (", kMaxTokens,
                  "), so the lengths must be known on the host: pass cu_seqlens_cpu");
}

}  // namespace xgdn::kernel::npu
