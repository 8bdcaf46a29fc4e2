// SPDX-License-Identifier: Apache-2.0
// Error classes: each derives from xgdn.Error and from the built-in that Python users expect.
#include <c10/util/Exception.h>
#include <nanobind/nanobind.h>

#include "bindings/bind.h"
#include "core/errors.h"

namespace nb = nanobind;

namespace xgdn {
namespace {

// torch's own errors, without the C++ frames that what() carries.
void translate_torch(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const c10::OutOfMemoryError& error) {
    PyErr_SetString(PyExc_MemoryError, error.what_without_backtrace());
  } catch (const c10::IndexError& error) {
    PyErr_SetString(PyExc_IndexError, error.what_without_backtrace());
  } catch (const c10::ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what_without_backtrace());
  } catch (const c10::NotImplementedError& error) {
    PyErr_SetString(PyExc_NotImplementedError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

template <typename T>
nb::handle add(nb::module_& m, const char* name, nb::handle base, PyObject* builtin) {
  return nb::exception<T>(m, name, nb::make_tuple(base, nb::handle(builtin)).ptr());
}

}  // namespace

void bind_errors(nb::module_& m) {
  nb::register_exception_translator(translate_torch);
  const nb::exception<Error> base(m, "Error");
  add<ShapeError>(m, "ShapeError", base, PyExc_ValueError);
  add<DtypeError>(m, "DtypeError", base, PyExc_TypeError);
  add<DeviceError>(m, "DeviceError", base, PyExc_ValueError);
  add<RangeError>(m, "RangeError", base, PyExc_IndexError);
  add<MissingMetadataError>(m, "MissingMetadataError", base, PyExc_ValueError);
  add<UnsupportedError>(m, "UnsupportedError", base, PyExc_NotImplementedError);
  add<CheckpointError>(m, "CheckpointError", base, PyExc_ValueError);
  add<RequestError>(m, "RequestError", base, PyExc_ValueError);
  const nb::handle generation = add<GenerationError>(m, "GenerationError", base, PyExc_RuntimeError);
  add<NumericsError>(m, "NumericsError", generation,
                     PyExc_ArithmeticError);  // behind its base: the last is tried first
  add<StoppedError>(m, "StoppedError", base, PyExc_RuntimeError);
  add<RankError>(m, "RankError", base, PyExc_RuntimeError);
  add<OutOfSlots>(m, "OutOfSlots", base, PyExc_RuntimeError);
  add<OutOfBlocks>(m, "OutOfBlocks", base, PyExc_RuntimeError);
  add<OutOfMemory>(m, "OutOfMemory", base, PyExc_MemoryError);
  add<StaleHandleError>(m, "StaleHandleError", base, PyExc_RuntimeError);
}

}  // namespace xgdn
