// SPDX-License-Identifier: Apache-2.0
// The checks of every op: dtypes, shapes, devices and strides, once, before a backend is selected.
#pragma once

#include "core/kernels/dispatch/dims.h"
#include "core/kernels/dispatch/sample.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {

// What checks/ has of each op.
//   match    compares what the tensors have with what they must have and binds the dimensions; throws what
//   ops/contract.h
//            names, for symbolic tensors too
//   shape    takes the sizes of the call from them
//   sample   makes a call of a typical shape, for doctor()
template <class Params>
Params sample(const TypicalTensors& t);

#define XGDN_OP_CHECK(Params, name, op_shape, ...) \
  Dims match(const Params& p);                     \
  op_shape shape(const Params& p, const Dims& d);  \
  template <>                                      \
  Params sample(const TypicalTensors& t);
XGDN_OPS(XGDN_OP_CHECK)
#undef XGDN_OP_CHECK

/// The dimensions of a call that has passed its check.
template <class Params>
Dims checked(const Params& p) {
  Dims d = match(p);
  d.check_written();
  return d;
}

/// Its sizes.
template <class Params>
typename Op<Params>::Shape checked_shape(const Params& p) {
  return shape(p, checked(p));
}

}  // namespace xgdn::kernel
