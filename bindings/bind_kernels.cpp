// SPDX-License-Identifier: Apache-2.0
// What the ops' backends say of themselves, and pooled chunk metadata. The ops are in torch.ops.xgdn.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings/bind.h"
#include "bindings/chunk_metadata_caster.h"
#include "core/kernels/ops_api.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {

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
      "allocate_chunk_metadata",
      [](int64_t max_sequences, int64_t max_tokens, int64_t num_v_heads_local, const DeviceArgument& device) {
        return kernel::allocate_chunk_metadata(max_sequences, max_tokens, num_v_heads_local,
                                               device.resolve("allocate_chunk_metadata"));
      },
      nb::kw_only(), "max_sequences"_a, "max_tokens"_a, "num_v_heads_local"_a, "device"_a = "cpu");
  m.def("write_chunk_metadata", &kernel::write_chunk_metadata, "cu_seqlens"_a, "num_v_heads_local"_a, "tables"_a,
        nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace xgdn
