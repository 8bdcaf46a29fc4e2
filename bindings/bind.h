// SPDX-License-Identifier: Apache-2.0
// One function per file of bindings, called by the module in this order.
#pragma once

#include <nanobind/nanobind.h>

namespace xgdn {

void bind_errors(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_layers(nanobind::module_& m);
void bind_runtime(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_engine_loop(nanobind::module_& m);

}  // namespace xgdn
