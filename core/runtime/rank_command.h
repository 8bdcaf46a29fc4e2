// SPDX-License-Identifier: Apache-2.0
// What rank 0 tells the ranks that follow it: steps, and every other change of the pools' contents.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "core/layers/gdn_state.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/pool_contents.h"
#include "core/runtime/process_group.h"

namespace xgdn {

/// One step of all ranks.
struct StepCommand {
  std::vector<SequenceStep> sequences;
};
/// A state goes to another slot.
struct CopySlotCommand {
  SlotGroup group;
  int32_t from;
  int32_t to;
};
/// A freed slot is filled.
struct FillSlotCommand {
  SlotGroup group;
  int32_t slot;
  SlotFill fill;
};
/// Tokens that a verification has left in a slot are those of its ring.
struct CommitDraftsCommand {
  int32_t slot;
  int64_t num_accepted;
};
/// A block's keys and values go to another.
struct CopyBlockCommand {
  int32_t from;
  int32_t to;
};
/// Blocks are kept in host memory under a number.
struct SaveBlocksCommand {
  int64_t id;
  std::vector<int32_t> blocks;
};
/// Rows of what is kept go back to blocks.
struct RestoreBlocksCommand {
  int64_t id;
  std::vector<int64_t> rows;
  std::vector<int32_t> blocks;
};
/// What is kept under the number is not wanted any more.
struct DropBlocksCommand {
  int64_t id;
};
/// Logits of some hidden states of the last step.
struct LogitsCommand {
  int64_t first;
  int64_t count;
};
/// Logits of a prompt by itself.
struct PromptLogitsCommand {
  std::vector<int32_t> prompt;
};
/// A sequence's memory goes to rank 0.
struct GatherMemoryCommand {
  MemoryPlace place;
};
/// A sequence's memory comes from rank 0.
struct ScatterMemoryCommand {
  MemoryPlace place;
};
/// There is nothing more to follow.
struct ShutDownCommand {};

/// Any of them.
using RankCommand = std::variant<StepCommand, CopySlotCommand, FillSlotCommand, CommitDraftsCommand, CopyBlockCommand,
                                 SaveBlocksCommand, RestoreBlocksCommand, DropBlocksCommand, LogitsCommand,
                                 PromptLogitsCommand, GatherMemoryCommand, ScatterMemoryCommand, ShutDownCommand>;

/// Appends a command to a message.
void append_command(std::vector<int32_t>& message, const RankCommand& command);
/// The commands of a message, in their order. Throws RankError for one that append_command() did not make.
std::vector<RankCommand> read_commands(const std::vector<int32_t>& message);

/// Messages from rank 0 to all others, each in one broadcast unless it is more than twice as long as the one before.
class CommandChannel {
 public:
  /// The group must outlive it.
  explicit CommandChannel(ProcessGroup& group) : group_(group) {}

  /// Rank 0's side; throws RankError.
  void send(const std::vector<int32_t>& message);
  /// The others': waits for the next message. Throws RankError when rank 0 has ended.
  std::vector<int32_t> receive();

 private:
  void adapt(int64_t size);

  ProcessGroup& group_;
  at::Tensor first_;  // [1 + capacity] i32  the message's size, and as much of it as fits
};

}  // namespace xgdn
