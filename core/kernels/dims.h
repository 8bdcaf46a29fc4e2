// SPDX-License-Identifier: Apache-2.0
// Checks tensors by naming their dimensions: a letter is bound at first sight, later tensors must agree with it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"

namespace xgdn::kernel {

/// Works on symbolic sizes, so that the same check serves real, meta and fake tensors.
class Dims {
 public:
  explicit Dims(std::string_view op) : op_(op) {}

  /// `names` is the expected shape, e.g. "T H K"; a name may be a number. Binds unknown letters, throws ShapeError where
  /// a bound letter disagrees, DeviceError where the device differs from that of the first tensor.
  Dims& match(std::string_view arg, const at::Tensor& t, std::string_view names);
  Dims& match(std::string_view arg, const std::optional<at::Tensor>& t, std::string_view names);

  /// Throws DtypeError unless the dtype is one of `allowed`.
  Dims& dtype(std::string_view arg, const at::Tensor& t, std::initializer_list<at::ScalarType> allowed);
  Dims& dtype(std::string_view arg, const std::optional<at::Tensor>& t, std::initializer_list<at::ScalarType> allowed);

  /// Throws ShapeError unless the last dimension is contiguous.
  Dims& last_contiguous(std::string_view arg, const at::Tensor& t);
  /// Throws ShapeError unless all dimensions but the first `free` are contiguous.
  Dims& contiguous(std::string_view arg, const at::Tensor& t, int64_t free = 0);
  Dims& contiguous(std::string_view arg, const std::optional<at::Tensor>& t);

  /// Throws ShapeError with `sentence` unless `ok`.
  Dims& require(bool ok, const std::string& sentence);

  bool has(char letter) const { return find(letter) != nullptr; }
  const c10::SymInt& sym(char letter) const;
  /// The size as an integer, for real tensors.
  int64_t operator[](const char* name) const { return sym_named(name).guard_int(__FILE__, __LINE__); }

  /// Binds a derived size.
  void bind(std::string_view name, c10::SymInt value, std::string_view arg);

  [[noreturn]] void fail(std::string_view arg, const std::string& expected, const std::string& got) const;
  const std::string& op() const { return op_; }

 private:
  struct Binding {
    std::string name;
    c10::SymInt size;
    std::string arg;  // which argument bound it
  };
  const Binding* find(std::string_view name) const;
  const Binding* find(char letter) const { return find(std::string_view(&letter, 1)); }
  const c10::SymInt& sym_named(std::string_view name) const;

  std::string op_;
  std::vector<Binding> bindings_;
  std::optional<c10::Device> device_;
  std::string device_arg_;
};

}  // namespace xgdn::kernel
