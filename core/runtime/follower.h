// SPDX-License-Identifier: Apache-2.0
// A rank of a model that several processes share, other than the first: it computes what rank 0 says.
#pragma once

#include <filesystem>
#include <map>
#include <memory>

#include "core/runtime/kv_cache.h"
#include "core/runtime/load_decoder.h"
#include "core/runtime/model_runner.h"
#include "core/runtime/rank_command.h"
#include "core/runtime/sharded_memory.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// Returns when every rank is here and has the same model, sizes of pools and step; called once by each, whatever its
/// rank. Throws RankError that says what differs, on every rank.
void meet_ranks(const HybridDecoder& model, const RunnerOptions& options, ProcessGroup& group);

/// Its part of the model, and pools whose slots and blocks have the numbers of rank 0's. For one thread.
class Follower {
 public:
  /// Loads a model directory and waits for the other ranks. Throws as load_decoder and meet_ranks, and RequestError for
  /// options without a group or of rank 0.
  static std::unique_ptr<Follower> load(const std::filesystem::path& dir, const EngineOptions& options);

  /// Serves a decoder that the caller has built; the decoder's shard has the group too.
  Follower(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options,
           std::shared_ptr<ProcessGroup> group);

  /// Computes until rank 0 shuts its engine down. Throws RankError when it ends otherwise, and what a step throws: then
  /// this process should end, so that the others learn of it.
  void follow();

 private:
  bool execute(const RankCommand& command);

  std::shared_ptr<const HybridDecoder> model_;
  std::shared_ptr<ProcessGroup> group_;
  StatePool states_;
  KvCache kv_;
  ModelRunner runner_;
  ShardedMemory memory_;
  CommandChannel channel_;
  std::map<int64_t, std::vector<KvPool>> saved_;  // by the number that rank 0 has given it
};

}  // namespace xgdn
