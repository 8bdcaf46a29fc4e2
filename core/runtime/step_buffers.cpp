// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/step_buffers.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>

namespace xgdn {
namespace {

constexpr auto kNumberBytes = static_cast<int64_t>(sizeof(int32_t));

at::TensorOptions numbers() {
  return at::TensorOptions().dtype(at::kInt);
}

std::vector<int64_t> offsets_of(const std::vector<int64_t>& rooms) {
  std::vector<int64_t> offsets{0};
  std::partial_sum(rooms.begin(), rooms.end(), std::back_inserter(offsets));
  return offsets;
}

int64_t words_of(int64_t num_flags) {
  return (num_flags + kNumberBytes - 1) / kNumberBytes;
}

}  // namespace

StepBuffers::StepBuffers(std::vector<int64_t> rooms, c10::Device device)
    : rooms_(std::move(rooms)),
      offsets_(offsets_of(rooms_)),
      memory_(at::empty({offsets_.back()}, numbers().device(device))) {}

int64_t StepBuffers::bytes(const std::vector<int64_t>& rooms) {
  return std::accumulate(rooms.begin(), rooms.end(), int64_t{0}) * kNumberBytes;
}

// The allocator of pinned memory lends it again only after the copies from it.
at::Tensor StepBuffers::host_memory() const {
  return memory_.is_cpu() ? memory_ : at::empty({offsets_.back()}, numbers().pinned_memory(true));
}

void StepBuffers::begin() {
  entries_.clear();
  used_ = 0;
  // Whoever has a view of them can free the buffers.
  if (memory_.storage().nbytes() < static_cast<size_t>(memory_.nbytes())) memory_ = at::empty_like(memory_);
  host_.reset();
  host_ = host_memory();
}

int32_t* StepBuffers::reserve(size_t region, int64_t count) {
  if (count > rooms_[region]) {
    const std::vector<int64_t> old_offsets = offsets_;
    const at::Tensor old = host_;
    rooms_[region] = std::max(count, 2 * rooms_[region]);
    offsets_ = offsets_of(rooms_);
    memory_ = at::empty({offsets_.back()}, memory_.options());
    host_ = host_memory();
    for (size_t i = 0; i + 1 < old_offsets.size(); ++i) {
      std::copy_n(old.const_data_ptr<int32_t>() + old_offsets[i], old_offsets[i + 1] - old_offsets[i],
                  host_.mutable_data_ptr<int32_t>() + offsets_[i]);
    }
    used_ = offsets_.back();
  }
  used_ = std::max(used_, offsets_[region] + count);
  return host_.mutable_data_ptr<int32_t>() + offsets_[region];
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

void StepBuffers::put_table(size_t region, const std::vector<std::span<const int32_t>>& rows, at::Tensor* device,
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
    return memory.narrow(0, offsets_[e.region], words_of(e.count)).view(at::kBool).narrow(0, 0, e.count);
  }
  const at::Tensor row = memory.narrow(0, offsets_[e.region], e.count);
  return e.columns > 0 ? row.view({e.count / e.columns, e.columns}) : row;
}

void StepBuffers::bind() {
  if (!memory_.is_same(host_)) memory_.narrow(0, 0, used_).copy_(host_.narrow(0, 0, used_), /*non_blocking=*/true);
  for (const Entry& e : entries_) {
    *e.device = view(memory_, e);
    if (e.host != nullptr) *e.host = view(host_, e);
  }
}

}  // namespace xgdn
