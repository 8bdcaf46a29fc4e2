// SPDX-License-Identifier: Apache-2.0
// What the ops' backends say of themselves. The ops are in torch.ops.xgdn.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bindings/bind.h"
#include "core/kernels/ops_api.h"

namespace nb = nanobind;

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
}

}  // namespace xgdn
