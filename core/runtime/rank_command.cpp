// SPDX-License-Identifier: Apache-2.0
// A message is int32 numbers: of each command its place in the variant, then its fields in their order; 64-bit numbers
// as two, vectors behind their size.
#include "core/runtime/rank_command.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <type_traits>
#include <utility>

#include "core/errors.h"

namespace xgdn {
namespace {

class Writer {
 public:
  explicit Writer(std::vector<int32_t>& words) : words_(words) {}

  template <class T>
  void operator()(const T& value) {
    if constexpr (std::is_enum_v<T> || std::same_as<T, bool> || std::same_as<T, int32_t>) {
      words_.push_back(static_cast<int32_t>(value));
    } else {
      static_assert(std::same_as<T, int64_t>);
      const auto bits = static_cast<uint64_t>(value);
      words_.push_back(static_cast<int32_t>(static_cast<uint32_t>(bits)));
      words_.push_back(static_cast<int32_t>(static_cast<uint32_t>(bits >> 32)));
    }
  }

  template <class T, class F>
  void each(const std::vector<T>& values, const F& f) {
    (*this)(std::ssize(values));
    for (const T& value : values) f(const_cast<T&>(value));
  }

 private:
  std::vector<int32_t>& words_;
};

class Reader {
 public:
  explicit Reader(const std::vector<int32_t>& words) : words_(words) {}

  bool is_at_end() const { return next_ == words_.size(); }

  template <class T>
  void operator()(T& value) {
    if constexpr (std::is_enum_v<T> || std::same_as<T, bool> || std::same_as<T, int32_t>) {
      value = static_cast<T>(word());
    } else {
      static_assert(std::same_as<T, int64_t>);
      const auto low = static_cast<uint32_t>(word());
      value = static_cast<int64_t>(uint64_t{static_cast<uint32_t>(word())} << 32 | low);
    }
  }

  template <class T, class F>
  void each(std::vector<T>& values, const F& f) {
    int64_t size = 0;
    (*this)(size);
    if (size < 0 || size > std::ssize(words_)) fail();
    values.resize(static_cast<size_t>(size));
    for (T& value : values) f(value);
  }

  [[noreturn]] static void fail() {
    throw RankError("[Follower] message: expected the commands of rank 0, got other numbers");
  }

 private:
  int32_t word() {
    if (is_at_end()) fail();
    return words_[next_++];
  }

  const std::vector<int32_t>& words_;
  size_t next_ = 0;
};

template <class Archive, class T>
void numbers(Archive& archive, std::vector<T>& values) {
  archive.each(values, [&](T& value) { archive(value); });
}

template <class Archive>
void fields(Archive& archive, SequenceStep& s) {
  archive(s.kind);
  numbers(archive, s.tokens);
  archive(s.num_cached);
  numbers(archive, s.state_slots);
  for (int32_t* number : {&s.write_slot, &s.conv_slot, &s.conv_write_slot, &s.num_accepted, &s.num_uncommitted}) {
    archive(*number);
  }
  archive(s.has_initial_state);
  numbers(archive, s.kv_blocks);
  archive(s.wants_logits);
  archive(s.num_hidden);
  archive(s.num_candidates);
}

template <class Archive>
void fields(Archive& archive, MemoryPlace& place) {
  for (int32_t& slot : place.slots) archive(slot);
  numbers(archive, place.blocks);
  archive(place.num_tokens);
}

template <class Archive>
void fields(Archive& archive, StepCommand& c) {
  archive.each(c.sequences, [&](SequenceStep& sequence) { fields(archive, sequence); });
}

template <class Archive>
void fields(Archive& archive, CopySlotCommand& c) {
  archive(c.group), archive(c.from), archive(c.to);
}

template <class Archive>
void fields(Archive& archive, FillSlotCommand& c) {
  archive(c.group), archive(c.slot), archive(c.fill);
}

template <class Archive>
void fields(Archive& archive, CommitDraftsCommand& c) {
  archive(c.slot), archive(c.num_accepted);
}

template <class Archive>
void fields(Archive& archive, CopyBlockCommand& c) {
  archive(c.from), archive(c.to);
}

template <class Archive>
void fields(Archive& archive, SaveBlocksCommand& c) {
  archive(c.id), numbers(archive, c.blocks);
}

template <class Archive>
void fields(Archive& archive, RestoreBlocksCommand& c) {
  archive(c.id), numbers(archive, c.rows), numbers(archive, c.blocks);
}

template <class Archive>
void fields(Archive& archive, DropBlocksCommand& c) {
  archive(c.id);
}

template <class Archive>
void fields(Archive& archive, LogitsCommand& c) {
  archive(c.first), archive(c.count);
}

template <class Archive>
void fields(Archive& archive, PromptLogitsCommand& c) {
  numbers(archive, c.prompt);
}

template <class Archive>
void fields(Archive& archive, GatherMemoryCommand& c) {
  fields(archive, c.place);
}

template <class Archive>
void fields(Archive& archive, ScatterMemoryCommand& c) {
  fields(archive, c.place);
}

template <class Archive>
void fields(Archive& /*archive*/, ShutDownCommand& /*c*/) {}

template <size_t... kPlaces>
RankCommand empty_command(size_t place, std::index_sequence<kPlaces...> /*places*/) {
  RankCommand command;
  const bool is_known = ((place == kPlaces && (command.emplace<kPlaces>(), true)) || ...);
  if (!is_known) Reader::fail();
  return command;
}

constexpr int64_t kLeastCapacity = 256;  // a kilobyte

}  // namespace

void append_command(std::vector<int32_t>& message, const RankCommand& command) {
  Writer writer(message);
  writer(static_cast<int32_t>(command.index()));
  std::visit([&](const auto& c) { fields(writer, const_cast<std::remove_cvref_t<decltype(c)>&>(c)); }, command);
}

std::vector<RankCommand> read_commands(const std::vector<int32_t>& message) {
  Reader reader(message);
  std::vector<RankCommand> commands;
  while (!reader.is_at_end()) {
    int32_t place = 0;
    reader(place);
    commands.push_back(
        empty_command(static_cast<size_t>(place), std::make_index_sequence<std::variant_size_v<RankCommand>>()));
    std::visit([&](auto& c) { fields(reader, c); }, commands.back());
  }
  return commands;
}

// Both sides do so after each message, so that they agree on the size of the next one's first part.
void CommandChannel::adapt(int64_t size) {
  const int64_t capacity = std::max(kLeastCapacity, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(size))));
  if (!first_.defined() || first_.numel() != capacity + 1) first_ = at::empty({capacity + 1}, at::kInt);
}

void CommandChannel::send(const std::vector<int32_t>& message) {
  if (!first_.defined()) adapt(0);
  const auto size = std::ssize(message);
  const int64_t at_once = std::min(size, first_.numel() - 1);
  auto* words = first_.mutable_data_ptr<int32_t>();
  words[0] = static_cast<int32_t>(size);
  std::copy_n(message.begin(), at_once, words + 1);
  group_.broadcast(first_);
  if (at_once < size) {
    at::Tensor rest = at::from_blob(const_cast<int32_t*>(message.data()) + at_once, {size - at_once}, at::kInt);
    group_.broadcast(rest);
  }
  adapt(size);
}

std::vector<int32_t> CommandChannel::receive() {
  if (!first_.defined()) adapt(0);
  group_.await_broadcast(first_);
  const auto* words = first_.const_data_ptr<int32_t>();
  const int64_t size = words[0];
  if (size < 0) Reader::fail();
  const int64_t at_once = std::min(size, first_.numel() - 1);
  std::vector<int32_t> message(static_cast<size_t>(size));
  std::copy_n(words + 1, at_once, message.begin());
  if (at_once < size) {
    at::Tensor rest = at::from_blob(message.data() + at_once, {size - at_once}, at::kInt);
    group_.broadcast(rest);
  }
  adapt(size);
  return message;
}

}  // namespace xgdn
