// SPDX-License-Identifier: Apache-2.0
// What the delta rules share on Ascend: a call's tokens as the device's ops take them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "core/errors.h"

namespace xgdn::kernel::npu {

using Sentence = std::optional<std::string>;

/// A row of one value, made once per device, dtype, value and power-of-two length.
at::Tensor constant(double value, int64_t length, const at::TensorOptions& options);

/// Lengths of the sequences, from their bounds on the host.
std::vector<int64_t> lengths_of(const at::Tensor& cu_seqlens_cpu);

/// x where valid [T], else zeros, whatever x holds there.
at::Tensor masked(const at::Tensor& x, const at::Tensor& valid);

/// q and k normalised where the call asks for it, beta in bf16, all contiguous.
struct Tokens {
  at::Tensor q, k, v, g, beta;

  Tokens rows(const at::Tensor& index) const;
  /// Padding may hold anything; the device's ops want numbers.
  Tokens without_padding(const at::Tensor& valid) const;
};
Tokens tokens_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
                 const at::Tensor& beta, bool normalise_qk);
template <typename Params>
Tokens tokens_of(const Params& p) {
  return tokens_of(p.q, p.k, p.v, p.g, p.beta, p.use_qk_l2norm_in_kernel);
}

double scale_of(const std::optional<double>& scale, int64_t K);

at::Tensor device_indices(const std::vector<int64_t>& values, const at::Tensor& like);

/// nullopt: the ops take these types; else a sentence. `why_not_f32` is the probe's, of an f32 pool.
Sentence why_not_dtype(const at::Tensor& in, const at::Tensor& state, const std::string& why_not_f32);

/// nullopt: the lengths are known on the host, or not wanted; else a sentence.
Sentence why_not_lengths(const std::optional<at::Tensor>& cu_seqlens_cpu);

inline constexpr int64_t kMaxTokens = 8;  // of a sequence in one call of the recurrent op

}  // namespace xgdn::kernel::npu
