// SPDX-License-Identifier: Apache-2.0
// How the rows of a paged cache lie in memory.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cpu {

/// A key head's row: D numbers of the dtype of the tokens, or D int8 codes and behind them the f32 scale of all.
struct KvRows {
  bool are_int8 = false;
  int64_t bytes = 0;  // of a row; rows lie one after the other
};

}  // namespace xgdn::kernel::cpu
