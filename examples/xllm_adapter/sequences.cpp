// SPDX-License-Identifier: Apache-2.0
#include "sequences.h"

#include <ATen/ops/tensor.h>

#include <algorithm>

namespace xllm::kernel::gdn {

int64_t Sequences::max_len() const {
  int32_t longest = 0;
  for (size_t n = 0; n + 1 < offsets.size(); ++n) longest = std::max(longest, offsets[n + 1] - offsets[n]);
  return longest;
}

std::vector<int64_t> Sequences::lengths() const {
  std::vector<int64_t> lengths;
  for (size_t n = 0; n + 1 < offsets.size(); ++n) lengths.push_back(offsets[n + 1] - offsets[n]);
  return lengths;
}

::xgdn::kernel::HostFacts Sequences::host() const {
  return {.cu_seqlens = at::tensor(offsets, at::kInt), .max_len = max_len()};
}

Sequences decoded_sequences_at(const at::Tensor& cu_seqlens, int64_t num_tokens) {
  if (cu_seqlens.is_cpu() || cu_seqlens.numel() != num_tokens + 1) return sequences_at(cu_seqlens);
  Sequences s{.cu_seqlens = i32(cu_seqlens), .offsets = {}};
  for (int32_t t = 0; t <= num_tokens; ++t) s.offsets.push_back(t);
  return s;
}

Sequences sequences_at(const at::Tensor& cu_seqlens) {
  expect<::xgdn::ShapeError>(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "sequences", "cu_seqlens", "[N+1]",
                             cu_seqlens.sizes());
  Sequences s{.cu_seqlens = i32(cu_seqlens), .offsets = {}};
  const at::Tensor host = s.cu_seqlens.cpu();
  s.offsets.assign(host.const_data_ptr<int32_t>(), host.const_data_ptr<int32_t>() + host.numel());
  return s;
}

Sequences equal_sequences(int64_t num, int64_t length, at::Device device) {
  return sequences_of(std::vector<int64_t>(num, length), device);
}

Sequences sequences_of(const std::vector<int64_t>& lengths, at::Device device, const at::Tensor& cu_seqlens) {
  Sequences s{.cu_seqlens = {}, .offsets = {0}};
  for (const int64_t length : lengths) s.offsets.push_back(s.offsets.back() + static_cast<int32_t>(length));
  s.cu_seqlens = cu_seqlens.defined() ? i32(cu_seqlens) : at::tensor(s.offsets, at::kInt).to(device);
  return s;
}

}  // namespace xllm::kernel::gdn
