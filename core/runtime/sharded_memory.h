// SPDX-License-Identifier: Apache-2.0
// A sequence's memory whose heads several ranks share: taken apart, and put together in the order of the whole model.
#pragma once

#include <cstdint>
#include <vector>

#include "core/layers/gdn_state.h"
#include "core/models/model_config.h"
#include "core/runtime/pool_contents.h"
#include "core/runtime/process_group.h"

namespace xgdn {

/// Which heads of each tensor a rank has.
class ShardedMemory {
 public:
  /// `specs`: of one rank's GDN layers.
  ShardedMemory(const ModelConfig& config, std::vector<std::vector<StateSpec>> specs, int64_t rank, int64_t world);

  /// The same of the whole model.
  std::vector<std::vector<StateSpec>> whole_specs() const;

  /// The rank's part of a memory of the whole model.
  SavedMemory part_of(const SavedMemory& whole) const;

  /// The whole model's, of all ranks' parts: on every rank. Throws RankError.
  SavedMemory gather(const SavedMemory& part, ProcessGroup& group) const;

  /// This rank's part of rank 0's `whole`, which the others leave empty; `like`: a part as it is now. Throws RankError.
  SavedMemory scatter(const SavedMemory* whole, const SavedMemory& like, ProcessGroup& group) const;

 private:
  // Heads that lie one after the other in a dimension, `width` elements each.
  struct Section {
    int64_t num_heads;  // of the whole model
    int64_t width;
  };
  // The dimension with heads, and what lies there; no sections: every rank has all.
  struct Split {
    int64_t dim;
    std::vector<Section> sections;
  };
  Split split_of(StateKind kind) const;
  Split split_of_kv() const;
  std::vector<int64_t> whole_shape(std::vector<int64_t> shape, const Split& split) const;
  at::Tensor part_of(const at::Tensor& whole, const Split& split) const;
  at::Tensor gather(const at::Tensor& part, const Split& split, ProcessGroup& group) const;
  template <class F>
  static SavedMemory for_tensors(const ShardedMemory& self, const SavedMemory& memory, const F& f);

  ModelConfig config_;
  std::vector<std::vector<StateSpec>> specs_;
  int64_t rank_;
  int64_t world_;
};

}  // namespace xgdn
