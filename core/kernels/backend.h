// SPDX-License-Identifier: Apache-2.0
// What a backend is: one class that does the work or says in a sentence why not.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "core/kernels/op_list.h"

namespace xgdn::kernel {

/// One op of a backend. `s` holds the sizes of the call, whose tensors have been checked.
template <class Params>
class BackendOp {
 public:
  using Shape = typename Op<Params>::Shape;

  virtual ~BackendOp() = default;

  // nullopt: the call can be served; else one sentence for the user.
  virtual std::optional<std::string> why_not(const Params& /*p*/, const Shape& /*s*/) const { return {}; }

  // Whether the call is batch-invariant: what a sequence (or a token, where an op has no sequences) gets has the same
  // bits whatever else is in the call, in whatever order, and with any number of threads. A backend promises it where
  // its own kernel serves the whole call; a library chooses by machine, sizes, threads and alignment.
  virtual bool is_batch_invariant(const Params& /*p*/, const Shape& /*s*/) const { return false; }

  virtual void run(const Params& p, const Shape& s) const = 0;
};

template <class List>
class BackendOps;
template <class... Params>
class BackendOps<OpList<Params...>> : public BackendOp<Params>... {
 public:
  using BackendOp<Params>::why_not...;
  using BackendOp<Params>::is_batch_invariant...;
  using BackendOp<Params>::run...;
};

/// Serves every op of the list. Nothing is inherited that does work: aten/ has compositions for a backend to call, and
/// HostBackend calls all of them.
class Backend : public BackendOps<AllOps> {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  virtual std::string_view name() const = 0;  // "reference" "cpu" "cuda" "npu"

  // Why it can serve nothing at all in this process; nullopt: it can.
  virtual std::optional<std::string> why_unavailable() const { return {}; }

  // Whether its paged_attention gathers all contexts at once, by PagedAttentionParams::context_rows.
  virtual bool reads_context_rows() const { return false; }

  // Whether the memory of its paged_attention grows with the context, which it copies and may make a mask for.
  virtual bool copies_contexts() const { return true; }

  // The same questions as in device.h.
  virtual bool has_graphs() const { return false; }
  virtual std::unique_ptr<DeviceGraph> record(const std::function<void()>& /*launches*/) const { return nullptr; }
  virtual bool finds_largest_logits() const { return false; }
  virtual LargestLogits largest_logits(const at::Tensor& /*logits*/) const { return {}; }
  virtual at::Tensor likeliest_logits(const at::Tensor& /*logits*/, int64_t /*count*/) const { return {}; }

  // Why not on this device; every backend's first answer.
  virtual std::optional<std::string> why_not_device(c10::Device device) const = 0;
};

}  // namespace xgdn::kernel
