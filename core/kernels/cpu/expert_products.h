// SPDX-License-Identifier: Apache-2.0
// Products of the experts of a mixture on the CPU over pointers, strides and sizes: the tokens of each expert times its
// own weight, by the kernels of the products with one weight. Work items of all experts are one list for the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "core/kernels/cpu/linear.h"
#include "core/kernels/cpu/linear_rows.h"
#include "core/kernels/cpu/quantized_linear.h"

namespace xgdn::kernel::cpu {

inline constexpr int64_t kExpertBlock = 32;  // outputs of a work item; the outputs of an expert are a multiple
static_assert(kExpertBlock == kLinearBlock && kExpertBlock == kLinearRowsStep * kLinearRowsPair &&
              kExpertBlock == kQuantizedLinearBlock);

/// Which experts the tokens have chosen, expert after expert. A visit is a token at one of its experts.
struct ExpertVisits {
  /// Neighbouring visits to one expert.
  struct Group {
    int64_t expert;
    int64_t begin;  // the first visit
    int64_t count;
    int64_t panel;  // the first panel
  };
  /// At most 16 visits of one group.
  struct Panel {
    int64_t begin;
    int64_t count;
  };

  std::vector<int64_t> tokens;  // [V]     ascending within a group
  std::vector<int64_t> visits;  // [T, A]  the visit that a choice is
  std::vector<Group> groups;    // of the experts that are visited, in ascending order
  std::vector<Panel> panels;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

ExpertVisits sort_by_expert(const int64_t* chosen, int64_t T, int64_t A, int64_t E);

/// Visiting tokens times a weight [E, O, D]. First every panel is arranged, then outputs are multiplied.
class ExpertProduct {
 public:
  virtual ~ExpertProduct() = default;

  /// Memory for the tokens, which must be aligned to 64 bytes.
  virtual int64_t num_bytes(const ExpertVisits& visits) const = 0;
  void set_memory(void* memory, const ExpertVisits& visits);

  /// Brings the tokens of a panel into the form in which they are multiplied. Visit v has row rows[v] of x [., D];
  /// null: row v.
  virtual void arrange(const InRows& x, const int64_t* rows, int64_t panel) const = 0;

  /// Computes `width` outputs, a multiple of 32 as `output` is, for the visits of a group.
  virtual void multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const = 0;

 protected:
  char* memory_ = nullptr;
  const ExpertVisits* visits_ = nullptr;
};

/// bf16 weights by linear_rows.h.
class ExpertRows final : public ExpertProduct {
 public:
  /// `args` has D, O and the weight [E, O, D]. `widens`: tokens are widened, else copied.
  ExpertRows(const LinearRowsArgs& args, bool widens) : args_(args), widens_(widens) {}

  int64_t num_bytes(const ExpertVisits& visits) const override;
  void arrange(const InRows& x, const int64_t* rows, int64_t panel) const override;
  void multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const override;

 private:
  LinearRowsArgs of_visits(int64_t visit, int64_t count) const;
  int64_t stride() const {  // bytes, from visit to visit
    return widens_ ? widened_stride(args_.D) * size_of(DType::kFloat32) : args_.D * size_of(DType::kBFloat16);
  }

  LinearRowsArgs args_;
  bool widens_;
};

/// bf16 weights by linear.h.
class ExpertTiles final : public ExpertProduct {
 public:
  /// `args` has D, O, the weight [E, O, D] and the products.
  explicit ExpertTiles(const LinearArgs& args) : args_(args) {}

  int64_t num_bytes(const ExpertVisits& visits) const override;
  void arrange(const InRows& x, const int64_t* rows, int64_t panel) const override;
  void multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const override;

 private:
  uint16_t* packed(int64_t panel) const;

  LinearArgs args_;
};

/// Weights in 8 or 4 bits.
class QuantizedExperts final : public ExpertProduct {
 public:
  /// `args` has D, O and the weight, whose tensors have a dimension E before their own.
  explicit QuantizedExperts(const QuantizedLinearArgs& args) : args_(args) {}

  int64_t num_bytes(const ExpertVisits& visits) const override;
  void arrange(const InRows& x, const int64_t* rows, int64_t panel) const override;
  void multiply(const ExpertVisits::Group& group, int64_t output, int64_t width, const OutRows& out) const override;

 private:
  QuantizedLinearArgs of_visits(int64_t visit, int64_t count) const;

  QuantizedLinearArgs args_;
};

/// Work items are blocks of outputs, group after group: neighbours read on in the weight of one expert.
inline int64_t num_work_items(const ExpertVisits& visits, int64_t outputs) {
  return static_cast<int64_t>(visits.groups.size()) * (outputs / kExpertBlock);
}

/// silu(gate) * up of the visits.
struct GatedExpertsArgs {
  int64_t I = 0;
  const ExpertVisits* visits = nullptr;
  const ExpertProduct* gate_up = nullptr;
  OutRows out;  // [V, 2I]  the second half of a row is memory for up; the head stride is 1
};
void gated_experts(const GatedExpertsArgs& args, int64_t begin_item, int64_t end_item);

/// The second product of the visits.
struct ExpertOutputsArgs {
  int64_t D = 0;
  const ExpertVisits* visits = nullptr;
  const ExpertProduct* down = nullptr;
  OutRows out;  // [V, D]  the head stride is 1
};
void expert_outputs(const ExpertOutputsArgs& args, int64_t begin_item, int64_t end_item);

}  // namespace xgdn::kernel::cpu
