// SPDX-License-Identifier: Apache-2.0
// The sequences of a call as xgdn's ops take them, and the adapter's errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/StringUtil.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/kernels/ops_api.h"

namespace xllm::kernel::gdn {

/// Throws E in the words of xgdn's errors: [op] argument: expected .., got ..
template <class E, class Expected, class Got>
void expect(bool is_met, std::string_view op, std::string_view argument, const Expected& expected, const Got& got) {
  if (!is_met) throw E(c10::str("[xllm ", op, "] ", argument, ": expected ", expected, ", got ", got));
}

/// N sequences packed into T tokens.
struct Sequences {
  at::Tensor cu_seqlens;         // [N+1] i32, beside the tokens
  std::vector<int32_t> offsets;  // [N+1], the same on the host

  int64_t num() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t max_len() const;
  std::vector<int64_t> lengths() const;
  ::xgdn::kernel::HostFacts host() const;
};

/// From offsets on the device of the tokens, in any integer type, which are copied to the host where they are not
/// there.
Sequences sequences_at(const at::Tensor& cu_seqlens);

/// The same of sequences that are decoded: on a device, as many as tokens are one token each, and nothing is copied.
Sequences decoded_sequences_at(const at::Tensor& cu_seqlens, int64_t num_tokens);

/// N sequences of `length` tokens each.
Sequences equal_sequences(int64_t num, int64_t length, at::Device device);

/// From lengths on the host. `cu_seqlens` is used where it is given; else it is made and copied to the device.
Sequences sequences_of(const std::vector<int64_t>& lengths, at::Device device, const at::Tensor& cu_seqlens = {});

inline at::Tensor i32(const at::Tensor& t) {
  return t.to(at::kInt).contiguous();
}

}  // namespace xllm::kernel::gdn
