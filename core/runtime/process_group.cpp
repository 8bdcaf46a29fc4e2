// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/process_group.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "core/errors.h"

namespace xgdn {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kForever = std::chrono::hours(24 * 365);
constexpr milliseconds kLoadingTime = std::chrono::hours(1);
constexpr milliseconds kStartingTime{1000};

// The first line of what a backend says.
std::string sentence_of(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string sentence = of_torch == nullptr ? error.what() : of_torch->what_without_backtrace();
  return sentence.substr(0, sentence.find('\n'));
}

}  // namespace

struct ProcessGroup::Group {
  c10::intrusive_ptr<c10d::ProcessGroup> ranks;
  milliseconds timeout;
  mutable std::timed_mutex starting;  // held by who starts something
  std::atomic<bool> has_ended = false;

  Group(c10::intrusive_ptr<c10d::ProcessGroup> group, milliseconds limit) : ranks(std::move(group)), timeout(limit) {}

  template <class F>
  auto start(const F& f) const {
    const std::lock_guard lock(starting);
    TORCH_CHECK(!has_ended, "the group has ended");
    return f();
  }

  // Starts what `f` starts, and waits for it: of tensors on a device, lets the device wait.
  template <class F>
  void run(const char* what, const F& f) const {
    try {
      start(f)->wait();
    } catch (const std::exception& error) {
      throw RankError(c10::str("[ProcessGroup] ", what, ": expected all ", ranks->getSize(),
                               " ranks to answer, got on rank ", ranks->getRank(), ": ", sentence_of(error)));
    }
  }

  at::Tensor all_gather(const at::Tensor& tensor, milliseconds limit) const {
    std::vector<int64_t> sizes = tensor.sizes().vec();
    sizes.insert(sizes.begin(), ranks->getSize());
    const at::Tensor gathered = at::empty(sizes, tensor.options());
    std::vector<std::vector<at::Tensor>> outputs{gathered.unbind(0)};
    std::vector<at::Tensor> inputs{tensor.contiguous()};
    run("all_gather", [&] { return ranks->allgather(outputs, inputs, {.timeout = limit}); });
    return gathered;
  }

  void broadcast(at::Tensor& tensor, milliseconds limit) const {
    std::vector<at::Tensor> tensors{tensor};
    run("broadcast", [&] { return ranks->broadcast(tensors, {.timeout = limit}); });
  }
};

ProcessGroup::ProcessGroup(const c10::intrusive_ptr<c10d::ProcessGroup>& group, milliseconds timeout)
    : group_(std::make_unique<Group>(group, timeout)) {}

ProcessGroup::~ProcessGroup() = default;

std::shared_ptr<ProcessGroup> ProcessGroup::named(const std::string& name, milliseconds timeout) {
  try {
    return std::make_shared<ProcessGroup>(c10d::resolve_process_group(name), timeout);
  } catch (const c10::Error& error) {
    throw RequestError(
        c10::str("[ProcessGroup] name: expected that of a group, got '", name, "': ", sentence_of(error)));
  }
}

int64_t ProcessGroup::rank() const {
  return group_->ranks->getRank();
}

int64_t ProcessGroup::world() const {
  return group_->ranks->getSize();
}

void ProcessGroup::end() {
  group_->has_ended = true;
  if (group_->starting.try_lock_for(kStartingTime)) group_->starting.unlock();
}

void ProcessGroup::sum(at::Tensor& tensor) {
  if (world() == 1 || tensor.numel() == 0) return;
  if (world() == 2 && tensor.is_contiguous()) {  // a + b and b + a are the same
    std::vector<at::Tensor> tensors{tensor};
    group_->run("sum", [&] { return group_->ranks->allreduce(tensors, {.timeout = group_->timeout}); });
    return;
  }
  const bool is_reduced = tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
  const at::Tensor parts = all_gather(tensor);
  at::Tensor total = parts[0].to(is_reduced ? at::kFloat : tensor.scalar_type());
  for (int64_t rank = 1; rank < world(); ++rank) total.add_(parts[rank]);
  tensor.copy_(total);
}

at::Tensor ProcessGroup::all_gather(const at::Tensor& tensor) {
  return group_->all_gather(tensor, group_->timeout);
}

void ProcessGroup::broadcast(at::Tensor& tensor) {
  group_->broadcast(tensor, group_->timeout);
}

void ProcessGroup::await_broadcast(at::Tensor& tensor) {
  group_->broadcast(tensor, kForever);
}

at::Tensor ProcessGroup::meet(const at::Tensor& numbers) {
  return group_->all_gather(numbers, kLoadingTime);
}

}  // namespace xgdn
