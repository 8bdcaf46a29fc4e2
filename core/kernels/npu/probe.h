// SPDX-License-Identifier: Apache-2.0
// What the Ascend ops of this process really do, found out once by calling them on a few numbers: op packages replace
// each other under one name, and wheel and CANN versions disagree about dtypes and argument orders.
#pragma once

#include <optional>
#include <string>

namespace xgdn::kernel::npu {

/// Meaning of the recurrent op's actual_seq_lengths.
enum class Lengths {
  kPerSequence,  // [B]: L1..LB                torch_npu
  kWithStart,    // [1 + B]: start, L1..LB     vllm-ascend, also where its package replaces torch_npu's kernel
};

/// Each `why_not_*` is empty where the thing works, else a sentence.
struct Capabilities {
  const char* recurrent_op = nullptr;  // the name to call
  Lengths lengths = Lengths::kPerSequence;
  std::string why_not_recurrent;
  std::string why_not_f32_state;  // of the recurrent op
  std::string why_not_chunk;
  std::string why_not_chunk_f32_state;
  std::string why_not_chunk_head_dims;  // other than 128
  std::string why_not_attention;
  std::string why_not_experts;

  /// One line for logs and doctor().
  std::string describe() const;
};

/// Why there is no Ascend device behind PrivateUse1 in this process; nullopt: there is one.
std::optional<std::string> why_no_device();

/// Runs the probe at the first call on a process's device; the same result ever after. Needs a device.
const Capabilities& capabilities();

}  // namespace xgdn::kernel::npu
