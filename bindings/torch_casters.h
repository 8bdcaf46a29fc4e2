// SPDX-License-Identifier: Apache-2.0
// torch.Tensor and torch.dtype cross into C++ without copies, on any device.
#pragma once

#include <nanobind/nanobind.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

namespace nanobind::detail {

template <>
struct type_caster<at::Tensor> {
  NB_TYPE_CASTER(at::Tensor, const_name("torch.Tensor"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (!THPVariable_Check(source.ptr())) return false;
    value = THPVariable_Unpack(source.ptr());
    return true;
  }

  static handle from_cpp(const at::Tensor& tensor, rv_policy, cleanup_list*) noexcept {
    try {
      return THPVariable_Wrap(tensor);
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return handle();
    }
  }
};

template <>
struct type_caster<at::ScalarType> {
  NB_TYPE_CASTER(at::ScalarType, const_name("torch.dtype"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (!THPDtype_Check(source.ptr())) return false;
    value = reinterpret_cast<THPDtype*>(source.ptr())->scalar_type;
    return true;
  }

  static handle from_cpp(at::ScalarType dtype, rv_policy, cleanup_list*) noexcept {
    return handle(reinterpret_cast<PyObject*>(torch::getTHPDtype(dtype))).inc_ref();
  }
};

}  // namespace nanobind::detail
