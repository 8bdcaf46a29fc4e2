// SPDX-License-Identifier: Apache-2.0
#include "core/layers/shard.h"

#include <c10/util/StringUtil.h>

#include "core/errors.h"

namespace xgdn {
namespace {

PieceRange checked_part(const Shard& shard, const char* layer, const char* name, int64_t size, bool divides,
                        const char* expected) {
  if (shard.world < 1 || shard.rank < 0 || shard.rank >= shard.world) {
    throw ShapeError(
        c10::str("[", layer, "] shard: expected a rank 0..world-1, got rank ", shard.rank, " of ", shard.world));
  }
  if (!divides) {
    throw ShapeError(
        c10::str("[", layer, "] shard: expected a world that ", expected, " ", name, "=", size, ", got ", shard.world));
  }
  return part_of(size, shard.rank, shard.world);
}

}  // namespace

PieceRange even_part(const Shard& shard, const char* layer, const char* name, int64_t size) {
  return checked_part(shard, layer, name, size, is_split_evenly(size, shard.world), "divides");
}

PieceRange even_or_shared_part(const Shard& shard, const char* layer, const char* name, int64_t size) {
  return checked_part(shard, layer, name, size, is_split_or_shared(size, shard.world), "divides or is a multiple of");
}

}  // namespace xgdn
