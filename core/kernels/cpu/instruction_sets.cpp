// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/cpu/instruction_sets.h"

#include <array>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#include "core/errors.h"
#include "hwy/targets.h"

namespace xgdn::kernel::cpu {

InstructionSet best_allowed_instruction_set() {
  constexpr std::array<std::pair<std::string_view, InstructionSet>, 5> kNames = {{
      {"sse4", InstructionSet::kSse4},
      {"avx2", InstructionSet::kAvx2},
      {"avx512", InstructionSet::kAvx512},
      {"avx512_bf16", InstructionSet::kAvx512BFloat16},
      {"amx", InstructionSet::kAmx},
  }};
  const char* value = std::getenv("XGDN_CPU_ISA");
  if (value == nullptr || *value == '\0') return InstructionSet::kAmx;
  for (const auto& [name, instruction_set] : kNames) {
    if (name == value) return instruction_set;
  }
  throw UnsupportedError("XGDN_CPU_ISA: expected sse4, avx2, avx512, avx512_bf16 or amx, got '" + std::string(value) +
                         "'");
}

void limit_highway_targets() {
  const InstructionSet best = best_allowed_instruction_set();
#if HWY_ARCH_X86  // better targets are lower bits
  if (best == InstructionSet::kAvx2) hwy::DisableTargets(HWY_AVX2 - 1);
  if (best == InstructionSet::kSse4) hwy::DisableTargets(HWY_SSE4 - 1);
#else
  (void)best;
#endif
}

}  // namespace xgdn::kernel::cpu
