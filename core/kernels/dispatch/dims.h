// SPDX-License-Identifier: Apache-2.0
// Checks tensors by naming their dimensions: a letter is bound at first sight, later tensors must agree with it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/util/StringUtil.h>

#include <forward_list>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"
#include "core/kernels/dispatch/memory.h"

namespace xgdn::kernel {

/// Works on symbolic sizes, so that the same check serves real, meta and fake tensors.
class Dims {
 public:
  /// The names of the op, of arguments and of dimensions must outlive the checks: they are literals, or of entry().
  explicit Dims(std::string_view op) : op_(op) {
    bindings_.reserve(kTypicalBindings);
    arguments_.reserve(kTypicalBindings);
  }

  Dims(Dims&&) = default;
  Dims(const Dims&) = delete;  // the names of entries are its own

  /// `names` is the expected shape, e.g. "T H K"; a name may be a number, and the last one "...", for any dimensions
  /// that follow. Binds unknown letters; throws ShapeError where a bound letter disagrees or the storage holds less
  /// than sizes and strides reach, DeviceError where the device differs from that of the first tensor. An absent
  /// optional matches. `t` must outlive the checks.
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

  /// Says that the op writes `arg`, which has been matched. Throws ShapeError where elements of it share memory.
  /// `in_place` names the inputs, e.g. "gate up", whose elements it may replace one by one.
  Dims& written(std::string_view arg, std::string_view in_place = {});
  /// Throws ShapeError where a written tensor shares memory with another tensor that has been matched, unless both are
  /// the same elements and the other was named `in_place`.
  void check_written() const;

  /// Throws ShapeError with the op's name and the sentence made of `parts` unless `ok`.
  template <class... Parts>
  Dims& require(bool ok, const Parts&... parts) {
    if (!ok) throw ShapeError(c10::str("[", op_, "] ", parts...));
    return *this;
  }

  /// The name of a tensor in the list `arg`, e.g. "pools[1]".
  std::string_view entry(std::string_view arg, size_t index);

  /// Binds a size that no tensor has as a dimension of its own.
  void bind(std::string_view name, c10::SymInt size, std::string_view arg);

  std::string_view op() const { return op_; }

  /// Whether the call has sizes alone: its tensors are meta, or fake.
  bool is_meta() const { return device_ && device_->is_meta(); }

  /// The size bound to `name`; operator[] as an integer, for real tensors.
  const c10::SymInt& sym(std::string_view name) const;
  int64_t operator[](std::string_view name) const { return sym(name).guard_int(__FILE__, __LINE__); }

 private:
  struct Binding {
    std::string_view name;
    c10::SymInt size;
    std::string_view arg;  // which argument bound it
  };
  struct Argument {
    std::string_view arg;
    const at::Tensor* tensor;
    Memory memory;
    bool is_written;
    std::string_view in_place;  // with is_written
  };
  const Binding* find(std::string_view name) const;
  [[noreturn]] void fail(std::string_view arg, const std::string& expected, const std::string& got) const;

  static constexpr size_t kTypicalBindings = 16;

  std::string_view op_;
  std::vector<Binding> bindings_;
  std::vector<Argument> arguments_;
  std::forward_list<std::string> entries_;  // their names stay where they are
  std::optional<c10::Device> device_;
  std::string_view device_arg_;
};

}  // namespace xgdn::kernel
