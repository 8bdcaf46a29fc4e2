// SPDX-License-Identifier: Apache-2.0
// Drafts from the sequence itself: what came after its last tokens when they came before.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace xgdn {

/// At most `most` tokens that followed the latest earlier occurrence of the sequence's last four tokens, or else three,
/// or two; none where there is no such occurrence. Text that repeats itself (code, quotations, tables) is found.
std::vector<int32_t> look_up_drafts(std::span<const int32_t> tokens, int64_t most);

}  // namespace xgdn
