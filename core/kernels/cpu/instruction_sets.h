// SPDX-License-Identifier: Apache-2.0
// Which instruction sets the CPU kernels may use: all that the machine has, or fewer by the environment, for tests and
// comparisons. XGDN_CPU_ISA = sse4 | avx2 | avx512 | avx512_bf16 | amx names the best one allowed; each includes those
// before it. Other architectures have one path and ignore it.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cpu {

enum class InstructionSet : uint8_t { kSse4, kAvx2, kAvx512, kAvx512BFloat16, kAmx };

/// Throws UnsupportedError for a name that is none of the above.
InstructionSet best_allowed_instruction_set();

/// Tells Highway, which chooses once a process: call it before the first kernel.
void limit_highway_targets();

}  // namespace xgdn::kernel::cpu
