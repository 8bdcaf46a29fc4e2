// SPDX-License-Identifier: Apache-2.0
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include "tests/xllm_adapter/device.h"

namespace xgdn::testing {
namespace {

/// Every test draws the same numbers, whichever others run.
class Seeded : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo&) override { at::manual_seed(0); }
};

}  // namespace

at::Device& device() {
  static at::Device device = at::kCPU;
  return device;
}

}  // namespace xgdn::testing

/// Runs the tests on a device, with gtest's arguments. New tensors of the CPU are full of NaN.
extern "C" int run_xllm_adapter_tests(const char* device, int argc, char** argv) {
  xgdn::testing::device() = at::Device(device);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  if (xgdn::testing::device().is_cpu()) ::testing::GTEST_FLAG(filter) = "-Npu*";
  ::testing::InitGoogleTest(&argc, argv);
  ::testing::UnitTest::GetInstance()->listeners().Append(new xgdn::testing::Seeded);
  return RUN_ALL_TESTS();
}
