// SPDX-License-Identifier: Apache-2.0
// The device of a call is the current one while a backend is chosen and runs, and the caller's afterwards.
#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <gtest/gtest.h>

#include <vector>

#include "core/errors.h"
#include "core/kernels/ops_api.h"

namespace xgdn::testing {
namespace {

constexpr auto kType = c10::DeviceType::CUDA;

// Devices without hardware: notes which of them become current.
class NotingGuard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current_}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_ = device.index();
    seen.push_back(device.index());
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }

  mutable std::vector<int> seen;

 private:
  mutable c10::DeviceIndex current_ = 0;
};

// Puts a guard in the place of torch's own.
class ScopedGuard {
 public:
  explicit ScopedGuard(const NotingGuard& guard) : before_(slot().exchange(&guard)) {}
  ~ScopedGuard() { slot() = before_; }

 private:
  static std::atomic<const c10::impl::DeviceGuardImplInterface*>& slot() {
    return c10::impl::device_guard_impl_registry[static_cast<size_t>(kType)];
  }
  const c10::impl::DeviceGuardImplInterface* before_;
};

// [0, 4] f32 on a device that nobody has memory of.
at::Tensor empty_on(c10::Device device) {
  at::DataPtr none(nullptr, device);
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0, std::move(none),
                                                             /*allocator=*/nullptr, /*resizable=*/false));
  at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), caffe2::TypeMeta::Make<float>());
  t.unsafeGetTensorImpl()->set_sizes_contiguous({0, 4});
  return t;
}

TEST(DeviceGuard, TheDeviceOfTheTensorsIsCurrent) {
  const NotingGuard guard;
  const ScopedGuard scope(guard);
  const c10::Device second(kType, 1);
  const at::Tensor gate = empty_on(second), up = empty_on(second), out = empty_on(second);
  EXPECT_THROW(kernel::silu_and_mul({.gate = gate, .up = up, .out = out, .backend = "reference"}), UnsupportedError);
  EXPECT_EQ(guard.seen, (std::vector<int>{1, 0}));
}

}  // namespace
}  // namespace xgdn::testing
