// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/dims.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <sstream>

#include "core/kernels/ops_api.h"

namespace xgdn::kernel {
namespace {

// Calls f with each name of "T H K". Every op call comes through here, so nothing is allocated.
template <class F>
void for_each_name(std::string_view names, const F& f) {
  while (!names.empty()) {
    const size_t end = std::min(names.find(' '), names.size());
    f(names.substr(0, end));
    names.remove_prefix(std::min(end + 1, names.size()));
  }
}

std::string shape_of(std::string_view names) {
  std::string text;
  for_each_name(names, [&](std::string_view name) {
    if (!text.empty()) text += ", ";
    text += name;
  });
  return "[" + text + "]";
}

bool is_number(std::string_view name) {
  return std::isdigit(static_cast<unsigned char>(name[0])) != 0;
}

// Any further dimensions.
bool is_rest(std::string_view name) {
  return name == "...";
}

int64_t to_number(std::string_view name) {
  int64_t number = 0;
  std::from_chars(name.data(), name.data() + name.size(), number);
  return number;
}

bool same(const c10::SymInt& a, const c10::SymInt& b) {
  if (auto x = a.maybe_as_int(), y = b.maybe_as_int(); x && y) return *x == *y;
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

std::string sizes_of(const at::Tensor& t) {
  std::ostringstream text;
  text << t.sym_sizes();
  return text.str();
}

}  // namespace

const Dims::Binding* Dims::find(std::string_view name) const {
  for (const Binding& b : bindings_) {
    if (b.name == name) return &b;
  }
  return nullptr;
}

const c10::SymInt& Dims::sym(std::string_view name) const {
  const Binding* b = find(name);
  if (b == nullptr) fail(name, "a dimension that an earlier argument binds", "none");
  return b->size;
}

void Dims::bind(std::string_view name, c10::SymInt size, std::string_view arg) {
  bindings_.push_back({name, std::move(size), arg});
}

std::string_view Dims::entry(std::string_view arg, size_t index) {
  return entries_.emplace_front(c10::str(arg, "[", index, "]"));
}

void Dims::fail(std::string_view arg, const std::string& expected, const std::string& got) const {
  throw ShapeError(c10::str("[", op_, "] ", arg, ": expected ", expected, ", got ", got));
}

Dims& Dims::match(std::string_view arg, const at::Tensor& t, std::string_view names) {
  if (!t.defined()) fail(arg, shape_of(names), "no tensor");
  int64_t rank = 0;
  bool has_rest = false;
  for_each_name(names, [&](std::string_view name) {
    has_rest = is_rest(name);
    if (!has_rest) ++rank;
  });
  if (has_rest ? t.dim() < rank : t.dim() != rank) fail(arg, shape_of(names), sizes_of(t));
  int64_t i = 0;
  for_each_name(names, [&](std::string_view name) {
    if (is_rest(name)) return;
    const c10::SymInt size = t.sym_size(i++);
    if (is_number(name)) {
      if (!same(size, to_number(name))) fail(arg, shape_of(names), sizes_of(t));
    } else if (const Binding* b = find(name)) {
      if (!same(size, b->size)) {
        fail(arg, c10::str(shape_of(names), " with ", b->name, "=", b->size, " (set by ", b->arg, ")"), sizes_of(t));
      }
    } else {
      bind(name, size, arg);
    }
  });
  if (!device_) {
    device_ = t.device();
    device_arg_ = arg;
  } else if (*device_ != t.device()) {
    throw DeviceError(c10::str("[", op_, "] ", arg, ": expected a tensor on ", device_->str(), " (set by ", device_arg_,
                               "), got one on ", t.device().str()));
  }
  check_storage(op_, arg, t);
  arguments_.push_back({.arg = arg, .tensor = &t, .memory = Memory(t), .is_written = false, .in_place = {}});
  return *this;
}

Dims& Dims::match(std::string_view arg, const std::optional<at::Tensor>& t, std::string_view names) {
  return t ? match(arg, *t, names) : *this;
}

Dims& Dims::dtype(std::string_view arg, const at::Tensor& t, std::initializer_list<at::ScalarType> allowed) {
  for (at::ScalarType type : allowed) {
    if (t.scalar_type() == type) return *this;
  }
  std::vector<std::string> names;
  for (at::ScalarType type : allowed) {
    const std::string name = c10::toString(type);
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  throw DtypeError(
      c10::str("[", op_, "] ", arg, ": expected ", c10::Join(" or ", names), ", got ", c10::toString(t.scalar_type())));
}

Dims& Dims::dtype(std::string_view arg, const std::optional<at::Tensor>& t,
                  std::initializer_list<at::ScalarType> allowed) {
  return t ? dtype(arg, *t, allowed) : *this;
}

Dims& Dims::last_contiguous(std::string_view arg, const at::Tensor& t) {
  return contiguous(arg, t, t.dim() - 1);
}

Dims& Dims::contiguous(std::string_view arg, const at::Tensor& t, int64_t free) {
  c10::SymInt stride = 1;
  for (int64_t d = t.dim() - 1; d >= free; --d) {
    // A dimension of one element has no stride to speak of.
    const bool counts = !t.sym_size(d).maybe_as_int() || t.sym_size(d) != 1;
    if (counts && !same(t.sym_stride(d), stride)) {
      std::ostringstream got;
      got << "strides " << t.sym_strides() << " for sizes " << t.sym_sizes() << " (call .contiguous() first)";
      fail(arg, free == 0 ? "a contiguous tensor" : c10::str("contiguous dimensions from ", free, " on"), got.str());
    }
    stride = stride * t.sym_size(d);
  }
  return *this;
}

Dims& Dims::contiguous(std::string_view arg, const std::optional<at::Tensor>& t) {
  return t ? contiguous(arg, *t) : *this;
}

Dims& Dims::written(std::string_view arg, std::string_view in_place) {
  for (Argument& a : arguments_) {
    if (a.arg != arg) continue;
    a.is_written = true;
    a.in_place = in_place;
    const std::optional<int64_t> dim = overlapping_dim(*a.tensor);
    if (!dim) continue;
    std::ostringstream got;
    got << "strides " << a.tensor->sym_strides() << " for sizes " << a.tensor->sym_sizes();
    fail(arg, c10::str("memory of its own for every element, with a larger stride of dimension ", *dim), got.str());
  }
  return *this;
}

void Dims::check_written() const {
  for (const Argument& written : arguments_) {
    if (!written.is_written) continue;
    for (const Argument& other : arguments_) {
      if (&other == &written || !written.memory.overlaps(other.memory)) continue;
      bool is_in_place = false;
      for_each_name(written.in_place, [&](std::string_view name) { is_in_place |= name == other.arg; });
      if (is_in_place && written.memory.is_same(other.memory)) continue;
      fail(written.arg, "memory of its own", c10::str("memory that ", other.arg, " lies in"));
    }
  }
}

void check_storage(std::string_view op, std::string_view arg, const at::Tensor& t) {
  const std::optional<int64_t> reached = bytes_reached(t);
  const std::optional<int64_t> held = bytes_held(t);
  if (!reached || !held || *reached <= *held) return;
  throw ShapeError(c10::str("[", op, "] ", arg, ": expected a storage of at least ", *reached,
                            " bytes, which its sizes and strides reach, got one of ", *held));
}

}  // namespace xgdn::kernel
