// SPDX-License-Identifier: Apache-2.0
// The ranks of a model that several processes share, as one of torch's process groups.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "core/layers/shard.h"

namespace c10d {
class ProcessGroup;
}

namespace xgdn {

/// Exchanges tensors between ranks: those on the host through a backend for hosts (gloo), which the group must have,
/// and those on a device through the device's own (NCCL, HCCL). Every rank makes the same calls in the same order. For
/// one thread at a time, except for end(). Every member throws RankError when a rank has ended or does not answer in
/// time; the group is of no use then.
class ProcessGroup : public AllReduce {
 public:
  /// `timeout`: within which every rank answers.
  ProcessGroup(const c10::intrusive_ptr<c10d::ProcessGroup>& group, std::chrono::milliseconds timeout);
  /// The group that is registered with torch under that name. Throws RequestError where there is none.
  static std::shared_ptr<ProcessGroup> named(const std::string& name, std::chrono::milliseconds timeout);
  ~ProcessGroup() override;

  int64_t rank() const;   // of this process
  int64_t world() const;  // number of ranks

  /// Nothing is started any more, so that nothing joins a group of the device's anew after that has been aborted.
  /// Waits up to a second for what another thread is starting.
  void end();

  /// Adds in the order of the ranks, reduced precision in float32, whatever the tensor's size: an element's bits do not
  /// depend on its place, as they do where rings add, and are the same on all ranks.
  void sum(at::Tensor& tensor) override;

  /// [world, ...]: every rank's tensor of that shape and dtype.
  at::Tensor all_gather(const at::Tensor& tensor);

  /// Rank 0's tensor on all ranks, in place; contiguous.
  void broadcast(at::Tensor& tensor);

  /// The same for those who wait for rank 0 to have something to do, however long that takes.
  void await_broadcast(at::Tensor& tensor);

  /// Returns when all ranks have called, which may take as long as loading a model, with every rank's numbers [world,
  /// N].
  at::Tensor meet(const at::Tensor& numbers);

 private:
  struct Group;
  std::unique_ptr<Group> group_;
};

}  // namespace xgdn
