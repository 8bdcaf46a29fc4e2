// SPDX-License-Identifier: Apache-2.0
// What a backend is: one class that does the work or says in a sentence why not.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "core/kernels/ops_api.h"

namespace xgdn::kernel {

/// Sizes of a delta-rule call, taken from the checked tensors. All later code takes sizes from here.
struct GdnShape {
  int64_t T = 0;   // tokens
  int64_t N = 0;   // sequences
  int64_t S = 0;   // slots
  int64_t H = 0;   // key heads
  int64_t HV = 0;  // value heads
  int64_t K = 0;   // key head dim
  int64_t V = 0;   // value head dim
  int64_t L = 1;   // columns of the slot table
};

/// Sizes of a convolution call.
struct ConvShape {
  int64_t T = 0;  // tokens
  int64_t N = 0;  // sequences
  int64_t S = 0;  // slots
  int64_t D = 0;  // channels
  int64_t W = 0;  // taps
  int64_t R = 0;  // rows of a conv slot
};

/// Sizes of a decode step: of the delta rule and of the convolution before it.
struct DecodeStepShape {
  GdnShape rule;
  ConvShape conv;
};

/// Sizes of a norm over the last dimension.
struct NormShape {
  int64_t T = 0;  // tokens
  int64_t H = 0;  // heads
  int64_t D = 0;  // head dim
};

/// Sizes of a product with weights, or of what stands between two.
struct LinearShape {
  int64_t T = 0;  // tokens
  int64_t D = 0;  // width of the input; 0 where there is no product
  int64_t O = 0;  // width of the output
};

/// Sizes of an attention call.
struct AttentionShape {
  int64_t T = 0;    // tokens
  int64_t N = 0;    // sequences
  int64_t HQ = 0;   // query heads
  int64_t HKV = 0;  // key heads
  int64_t D = 0;    // head dim
};

/// Sizes of a call of a mixture of experts.
struct ExpertsShape {
  int64_t T = 0;  // tokens
  int64_t A = 0;  // experts of a token
  int64_t E = 0;  // experts
  int64_t D = 0;  // width of a token
  int64_t I = 0;  // width of an expert
};

/// A backend serves every op. The two delta rules have no default; the other ops have one, composed from ATen:
/// aten_defaults.cpp runs on every device without reading it from the host, aten_loops.cpp goes through sequences and
/// experts one by one.
class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual std::string_view name() const = 0;  // "reference" "cpu" "cuda" "npu"

  // Why it can serve nothing at all in this process; nullopt: it can.
  virtual std::optional<std::string> why_unavailable() const { return {}; }

  // nullopt: the call can be served; else one sentence for the user. The device test is every backend's first answer.
  virtual std::optional<std::string> why_not_device(c10::Device device) const = 0;
  virtual std::optional<std::string> why_not(const RecurrentGatedDeltaRuleParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const ChunkGatedDeltaRuleParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const PackedDecodeParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const CausalConv1dParams&, const ConvShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const CausalConv1dUpdateParams&, const ConvShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const GdnGatingParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const L2NormParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const RmsNormGatedParams&, const GdnShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const RmsNormParams&, const NormShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const SiluAndMulParams&, const LinearShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const LinearParams&, const LinearShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const GdnDecodeStepParams& p, const DecodeStepShape& s) const;
  virtual std::optional<std::string> why_not(const PagedAttentionParams&, const AttentionShape&) const { return {}; }
  virtual std::optional<std::string> why_not(const MoeExpertsParams&, const ExpertsShape&) const { return {}; }

  // Whether the call is batch-invariant: what a sequence (or a token, where an op has no sequences) gets has the same
  // bits whatever else is in the call, in whatever order, and with any number of threads. A backend promises it where
  // its own kernel serves the whole call; a library chooses by machine, sizes, threads and alignment.
  virtual bool is_batch_invariant(const RecurrentGatedDeltaRuleParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const ChunkGatedDeltaRuleParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const PackedDecodeParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const CausalConv1dParams&, const ConvShape&) const { return false; }
  virtual bool is_batch_invariant(const CausalConv1dUpdateParams&, const ConvShape&) const { return false; }
  virtual bool is_batch_invariant(const GdnGatingParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const L2NormParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const RmsNormGatedParams&, const GdnShape&) const { return false; }
  virtual bool is_batch_invariant(const RmsNormParams&, const NormShape&) const { return false; }
  virtual bool is_batch_invariant(const SiluAndMulParams&, const LinearShape&) const { return false; }
  virtual bool is_batch_invariant(const LinearParams&, const LinearShape&) const { return false; }
  virtual bool is_batch_invariant(const GdnDecodeStepParams&, const DecodeStepShape&) const { return false; }
  virtual bool is_batch_invariant(const PagedAttentionParams&, const AttentionShape&) const { return false; }
  virtual bool is_batch_invariant(const MoeExpertsParams&, const ExpertsShape&) const { return false; }

  virtual void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const = 0;
  virtual void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const = 0;
  virtual void run(const PackedDecodeParams& p, const GdnShape& s) const;
  virtual void run(const CausalConv1dParams& p, const ConvShape& s) const;
  virtual void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const;
  virtual void run(const GdnGatingParams& p, const GdnShape& s) const;
  virtual void run(const L2NormParams& p, const GdnShape& s) const;
  virtual void run(const RmsNormGatedParams& p, const GdnShape& s) const;
  virtual void run(const RmsNormParams& p, const NormShape& s) const;
  virtual void run(const SiluAndMulParams& p, const LinearShape& s) const;
  virtual void run(const LinearParams& p, const LinearShape& s) const;
  virtual void run(const GdnDecodeStepParams& p, const DecodeStepShape& s) const;
  virtual void run(const PagedAttentionParams& p, const AttentionShape& s) const;
  virtual void run(const MoeExpertsParams& p, const ExpertsShape& s) const;

 protected:
  // The default attention, of the sequences with more than so many tokens.
  static void attend_one_by_one(const PagedAttentionParams& p, int64_t more_than);
};

}  // namespace xgdn::kernel
