// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/memory.h"

#include <c10/core/impl/COW.h>

#include <algorithm>

namespace xgdn::kernel {
namespace {

struct Dim {
  int64_t size;
  int64_t stride;  // bytes
};

// Blocks of `block` bytes without gaps, repeated along `dims`, the largest stride first.
struct Layout {
  std::vector<Dim> dims;
  int64_t block;

  int64_t span(size_t from = 0) const {
    int64_t bytes = block;
    for (size_t d = from; d < dims.size(); ++d) bytes += (dims[d].size - 1) * dims[d].stride;
    return bytes;
  }
};

bool is_symbolic(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

Layout layout_of(const at::Tensor& t) {
  const auto item = static_cast<int64_t>(t.itemsize());
  Layout layout{.dims = {}, .block = item};
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) layout.dims.push_back({t.size(d), t.stride(d) * item});
  }
  std::sort(layout.dims.begin(), layout.dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  while (!layout.dims.empty() && layout.dims.back().stride <= layout.block) {
    layout.block += (layout.dims.back().size - 1) * layout.dims.back().stride;
    layout.dims.pop_back();
  }
  // Windows that overlap leave no gaps that are worth telling.
  for (size_t d = 0; d < layout.dims.size(); ++d) {
    if (layout.dims[d].stride < layout.span(d + 1)) return {.dims = {}, .block = layout.span()};
  }
  return layout;
}

int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// Whether blocks of a, from byte 0, meet blocks of b, from byte `delta`. Takes the dimension of the largest stride off,
// and looks at those of its rows that come near the other.
class Meeting {
 public:
  Meeting(const Layout& a, const Layout& b) : a_(a), b_(b) {}

  bool at(int64_t delta, size_t i = 0, size_t j = 0) {
    const int64_t span_a = a_.span(i);
    const int64_t span_b = b_.span(j);
    if (delta >= span_a || delta + span_b <= 0 || --effort_ < 0) return false;
    const bool is_block_a = i == a_.dims.size();
    const bool is_block_b = j == b_.dims.size();
    if (is_block_a && is_block_b) return true;
    if (!is_block_a && !is_block_b && a_.dims[i].stride == b_.dims[j].stride) {
      const Dim& rows = a_.dims[i];
      return any(rows.stride, delta, a_.span(i + 1), b_.span(j + 1), -(b_.dims[j].size - 1), rows.size - 1,
                 [&](int64_t k) { return at(delta - k * rows.stride, i + 1, j + 1); });
    }
    if (is_block_b || (!is_block_a && a_.dims[i].stride > b_.dims[j].stride)) {
      const Dim& rows = a_.dims[i];
      return any(rows.stride, delta, a_.span(i + 1), span_b, 0, rows.size - 1,
                 [&](int64_t k) { return at(delta - k * rows.stride, i + 1, j); });
    }
    const Dim& rows = b_.dims[j];
    return any(rows.stride, -delta, b_.span(j + 1), span_a, 0, rows.size - 1,
               [&](int64_t k) { return at(delta + k * rows.stride, i, j + 1); });
  }

 private:
  // Whether f(k) holds for a k in first..last for which a row of `row` bytes at k * stride comes near `other` bytes at
  // `delta`.
  template <class F>
  bool any(int64_t stride, int64_t delta, int64_t row, int64_t other, int64_t first, int64_t last, const F& f) {
    const int64_t low = std::max(first, floor_div(delta - row, stride) + 1);
    const int64_t high = std::min(last, floor_div(delta + other - 1, stride));
    for (int64_t k = low; k <= high && effort_ > 0; ++k) {
      if (f(k)) return true;
    }
    return false;
  }

  const Layout& a_;
  const Layout& b_;
  int effort_ = 256;
};

}  // namespace

std::optional<int64_t> bytes_reached(const at::Tensor& t) {
  if (is_symbolic(t)) return std::nullopt;
  if (t.numel() == 0) return 0;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * static_cast<int64_t>(t.itemsize());
}

std::optional<int64_t> bytes_held(const at::Tensor& t) {
  return t.has_storage() ? t.storage().sym_nbytes().maybe_as_int() : std::nullopt;
}

std::optional<int64_t> overlapping_dim(const at::Tensor& t) {
  const auto is_certain = [](const c10::SymBool& is) { return is.statically_known_true(__FILE__, __LINE__); };
  std::vector<int64_t> dims;  // ascending by stride, as far as that is known
  for (int64_t d = 0; d < t.dim(); ++d) {
    const c10::SymInt size = t.sym_size(d);
    if (is_certain(size.sym_eq(0))) return std::nullopt;
    if (is_certain(size.sym_eq(1))) continue;
    const auto is_larger = [&](int64_t other) { return is_certain(t.sym_stride(other).sym_gt(t.sym_stride(d))); };
    dims.insert(std::find_if(dims.begin(), dims.end(), is_larger), d);
  }
  c10::SymInt span = 1;
  for (const int64_t d : dims) {
    // A symbolic size may be 1, where the stride does not count.
    const bool counts = is_certain(t.sym_size(d).sym_gt(1));
    if (counts && is_certain(t.sym_stride(d).sym_lt(span))) return d;
    span = span + (t.sym_size(d) - 1) * t.sym_stride(d);
  }
  return std::nullopt;
}

Memory::Memory(const at::Tensor& t) : tensor_(&t) {
  const std::optional<int64_t> reached = bytes_reached(t);
  if (!reached || *reached == 0 || !t.has_storage()) return;
  c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
  const c10::DataPtr& memory = storage->_mutable_data_ptr_no_checks();
  // Two storages may hold the same memory, as where it came from NumPy. Copies on write are at the same address until
  // they are written; meta and fake tensors are at none.
  const bool has_address = memory.get() != nullptr && !c10::impl::cow::is_cow_data_ptr(memory);
  space_ = has_address ? nullptr : storage;
  const int64_t base = has_address ? reinterpret_cast<int64_t>(memory.get()) : 0;
  begin_ = base + t.storage_offset() * static_cast<int64_t>(t.itemsize());
  end_ = base + *reached;
}

bool Memory::overlaps(const Memory& other) const {
  const bool are_near = begin_ < other.end_ && other.begin_ < end_ && space_ == other.space_ &&
                        tensor_->device() == other.tensor_->device();
  return are_near && Meeting(layout_of(*tensor_), layout_of(*other.tensor_)).at(other.begin_ - begin_);
}

bool Memory::is_same(const Memory& other) const {
  return begin_ == other.begin_ && end_ == other.end_ && space_ == other.space_ &&
         tensor_->scalar_type() == other.tensor_->scalar_type() && tensor_->sizes() == other.tensor_->sizes() &&
         tensor_->strides() == other.tensor_->strides();
}

}  // namespace xgdn::kernel
