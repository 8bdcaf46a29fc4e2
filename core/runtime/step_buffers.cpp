// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/step_buffers.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

constexpr auto kNumberBytes = static_cast<int64_t>(sizeof(int32_t));

at::TensorOptions numbers() {
  return at::TensorOptions().dtype(at::kInt);
}

std::vector<int64_t> begins_of(const std::vector<int64_t>& rooms) {
  std::vector<int64_t> begins{0};
  std::partial_sum(rooms.begin(), rooms.end(), std::back_inserter(begins));
  return begins;
}

int64_t words_of(int64_t num_flags) {
  return (num_flags + kNumberBytes - 1) / kNumberBytes;
}

}  // namespace

StepBuffers::StepBuffers(std::vector<int64_t> rooms, c10::Device device)
    : rooms_(std::move(rooms)),
      begins_(begins_of(rooms_)),
      memory_(at::empty({begins_.back()}, numbers().device(device))) {}

int64_t StepBuffers::bytes(const std::vector<int64_t>& rooms) {
  return std::accumulate(rooms.begin(), rooms.end(), int64_t{0}) * kNumberBytes;
}

// The allocator of pinned memory lends it again only after the copies from it.
at::Tensor StepBuffers::host_memory() const {
  return memory_.is_cpu() ? memory_ : at::empty({begins_.back()}, numbers().pinned_memory(true));
}

void StepBuffers::begin() {
  kernel::check_storage("BatchBuilder", "buffers", memory_);  // whoever has a view can free it
  entries_.clear();
  end_ = 0;
  host_ = host_memory();
}

int32_t* StepBuffers::reserve(size_t region, int64_t count) {
  if (count > rooms_[region]) {
    const std::vector<int64_t> old_begins = begins_;
    const at::Tensor old = host_;
    rooms_[region] = std::max(count, 2 * rooms_[region]);
    begins_ = begins_of(rooms_);
    memory_ = at::empty({begins_.back()}, memory_.options());
    host_ = host_memory();
    for (size_t i = 0; i + 1 < old_begins.size(); ++i) {
      std::copy_n(old.const_data_ptr<int32_t>() + old_begins[i], old_begins[i + 1] - old_begins[i],
                  host_.mutable_data_ptr<int32_t>() + begins_[i]);
    }
    end_ = begins_.back();
  }
  end_ = std::max(end_, begins_[region] + count);
  return host_.mutable_data_ptr<int32_t>() + begins_[region];
}

void StepBuffers::put(size_t region, const std::vector<int32_t>& values, at::Tensor* device, int64_t columns,
                      at::Tensor* host) {
  std::copy(values.begin(), values.end(), reserve(region, std::ssize(values)));
  entries_.push_back({region, std::ssize(values), columns, /*is_flags=*/false, device, host});
}

void StepBuffers::put_flags(size_t region, const std::vector<uint8_t>& flags, at::Tensor* device) {
  int32_t* words = reserve(region, words_of(std::ssize(flags)));
  if (!flags.empty()) std::memcpy(words, flags.data(), flags.size());
  entries_.push_back({region, std::ssize(flags), /*columns=*/0, /*is_flags=*/true, device, nullptr});
}

void StepBuffers::put_table(size_t region, const std::vector<std::vector<int32_t>>& rows, at::Tensor* device,
                            int64_t columns) {
  const int64_t count = std::ssize(rows) * columns;
  int32_t* table = reserve(region, count);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy(rows[i].begin(), rows[i].end(), table + static_cast<int64_t>(i) * columns);
  }
  entries_.push_back({region, count, columns, /*is_flags=*/false, device, nullptr});
}

at::Tensor StepBuffers::view(const at::Tensor& memory, const Entry& e) const {
  if (e.is_flags) {
    return memory.narrow(0, begins_[e.region], words_of(e.count)).view(at::kBool).narrow(0, 0, e.count);
  }
  const at::Tensor row = memory.narrow(0, begins_[e.region], e.count);
  return e.columns > 0 ? row.view({e.count / e.columns, e.columns}) : row;
}

void StepBuffers::bind() {
  if (!memory_.is_same(host_)) memory_.narrow(0, 0, end_).copy_(host_.narrow(0, 0, end_), /*non_blocking=*/true);
  for (const Entry& e : entries_) {
    *e.device = view(memory_, e);
    if (e.host != nullptr) *e.host = view(host_, e);
  }
}

}  // namespace xgdn
