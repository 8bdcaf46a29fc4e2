// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>

#include "bindings/bind.h"

NB_MODULE(_C, m) {
  nanobind::module_::import_("torch");
  nanobind::set_leak_warnings(false);  // interactive shells and test runners keep objects beyond the interpreter's end
  m.doc() = "The C++ classes of xgdn. The package xgdn documents and re-exports what is meant for users.";
  xgdn::bind_errors(m);
  xgdn::bind_kernels(m);
  xgdn::bind_layers(m);
  xgdn::bind_runtime(m);
  xgdn::bind_engine(m);
  xgdn::bind_engine_loop(m);
}
