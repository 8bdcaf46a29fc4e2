// SPDX-License-Identifier: Apache-2.0
// torch.Tensor, torch.dtype and torch.device cross into C++ without copies, on any device.
#pragma once

#include <c10/util/StringUtil.h>
#include <nanobind/nanobind.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

#include "core/errors.h"

namespace xgdn {

/// What Python gave for a device: a torch.device or its name.
struct DeviceArgument {
  std::string name;

  /// Throws DeviceError where torch does not know the name; `where` is what was called.
  c10::Device resolve(const char* where) const {
    try {
      return c10::Device(name);
    } catch (const c10::Error&) {
      throw DeviceError(c10::str(
          "[", where, "] device: expected a name that torch knows (npu: where torch_npu is loaded), got '", name, "'"));
    }
  }
};

}  // namespace xgdn

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
struct type_caster<xgdn::DeviceArgument> {
  NB_TYPE_CASTER(xgdn::DeviceArgument, const_name("torch.device | str"))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    if (THPDevice_Check(source.ptr())) {
      value.name = reinterpret_cast<THPDevice*>(source.ptr())->device.str();
      return true;
    }
    const char* text = PyUnicode_Check(source.ptr()) ? PyUnicode_AsUTF8(source.ptr()) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      return false;
    }
    value.name = text;
    return true;
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
