// SPDX-License-Identifier: Apache-2.0
// What the ops' backends say of themselves, and pooled chunk metadata. The ops are in torch.ops.xgdn.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>

#include "bindings/bind.h"
#include "bindings/chunk_metadata_caster.h"
#include "core/checkpoint/checkpoint.h"
#include "core/kernels/ops_api.h"
#include "core/models/rounded_weights.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

// Enters and leaves a scope of C++.
class StepMemoryScope {
 public:
  void enter() { entered_.emplace(); }
  void exit() { entered_.reset(); }

 private:
  struct Entered {
    kernel::StepMemory memory;
    kernel::StepMemory::Use use{memory};
  };

  std::optional<Entered> entered_;
};

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def(
      "doctor",
      [] {
        std::vector<std::tuple<std::string, std::string, std::optional<std::string>, bool, bool>> rows;
        for (const kernel::BackendReport& r : kernel::doctor())
          rows.emplace_back(r.op, r.backend, r.why_not, r.is_selected, r.is_batch_invariant);
        return rows;
      },
      nb::call_guard<nb::gil_scoped_release>(), "Rows (op, backend, why not, is selected, is batch-invariant).");
  nb::class_<kernel::OpTime>(m, "OpTime", "The calls of one op with sizes of one kind.")
      .def_ro("op", &kernel::OpTime::op)
      .def_ro("sizes", &kernel::OpTime::sizes, "Of heads, experts or weights (outputs x inputs); not of tokens.")
      .def_ro("calls", &kernel::OpTime::calls)
      .def_ro("seconds", &kernel::OpTime::seconds, "In the calls, with their checks.")
      .def_ro("seconds_before", &kernel::OpTime::seconds_before,
              "From the end of the op before, or from the start of the profile, to each call.");
  m.def("start_op_profile", &kernel::start_op_profile, "Begin to time the ops that this thread calls.");
  m.def("stop_op_profile", &kernel::stop_op_profile, "End it; return the rows in the order of the first calls.");
  m.def(
      "allocate_weight",
      [](const std::vector<int64_t>& shape, const at::Tensor& like) {
        return kernel::allocate_weight(shape, like.options());
      },
      "shape"_a, "like"_a, "Uninitialised, of the type and device of `like`; in huge pages where the system has them.");
  nb::class_<StepMemoryScope>(m, "StepMemory", "Memory for the temporaries of a step, for as long as it is entered.")
      .def(nb::init<>())
      .def("__enter__", &StepMemoryScope::enter)
      .def(
          "__exit__", [](StepMemoryScope& scope, const nb::args&) { scope.exit(); },
          nb::sig("def __exit__(self, *error: object) -> None"));
  m.def(
      "allocate_temporary",
      [](const std::vector<int64_t>& shape, const at::Tensor& like, std::optional<at::ScalarType> dtype) {
        return kernel::allocate_temporary(shape, like.options().dtype(dtype.value_or(like.scalar_type())));
      },
      "shape"_a, "like"_a, "dtype"_a.none(), "Uninitialised, in the step memory that this thread has entered, if any.");
  m.def(
      "allocate_chunk_metadata",
      [](int64_t max_sequences, int64_t max_tokens, int64_t num_v_heads_local, const DeviceArgument& device) {
        return kernel::allocate_chunk_metadata(max_sequences, max_tokens, num_v_heads_local,
                                               device.resolve("allocate_chunk_metadata"));
      },
      nb::kw_only(), "max_sequences"_a, "max_tokens"_a, "num_v_heads_local"_a, "device"_a = "cpu");
  nb::enum_<kernel::WeightFormat>(m, "WeightFormat", "How the elements of a weight are stored.")
      .value("INT8", kernel::WeightFormat::kInt8)
      .value("INT4", kernel::WeightFormat::kInt4)
      .value("FLOAT8", kernel::WeightFormat::kFloat8);
  m.def(
      "quantize_rows",
      [](const at::Tensor& weight, kernel::WeightFormat format, int64_t group_size) {
        const kernel::QuantizedRows rows = kernel::quantize_rows(weight, format, group_size);
        return std::tuple(rows.codes, rows.scales);
      },
      "weight"_a, "format"_a, "group_size"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "pack_rows",
      [](const at::Tensor& codes, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
         const std::optional<at::Tensor>& order, kernel::WeightFormat format, int64_t group_size) {
        const kernel::QuantizedWeight w = kernel::pack_rows({.format = format,
                                                             .group_size = group_size,
                                                             .codes = codes,
                                                             .scales = scales,
                                                             .zeros = zeros,
                                                             .order = order});
        return std::tuple(w.codes, w.scales, w.zeros, w.order);
      },
      "codes"_a, "scales"_a, "zeros"_a.none(), "order"_a.none(), "format"_a, "group_size"_a,
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "rounding_of",
      [](const std::string& name, const std::vector<int64_t>& shape,
         kernel::WeightFormat format) -> std::optional<std::tuple<kernel::WeightFormat, int64_t>> {
        if (is_other_part(bare_name(name))) return std::nullopt;
        const std::optional<Rounding> rounding = rounding_of(name, shape, format);
        if (!rounding) return std::nullopt;
        return std::tuple(rounding->format, rounding->group_size);
      },
      "name"_a, "shape"_a, "format"_a, "Format and group size of a checkpoint's weight; None: it stays plain.");
  m.def("write_chunk_metadata", &kernel::write_chunk_metadata, "cu_seqlens"_a, "num_v_heads_local"_a, "tables"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace xgdn
