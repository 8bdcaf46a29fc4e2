// SPDX-License-Identifier: Apache-2.0
// The entry of a test program: gtest's, with ATen's random numbers of a test given by --gtest_random_seed alone, so
// that what fails once fails again. ATen's own seed is another one in every process.
#include <ATen/Context.h>
#include <gtest/gtest.h>

namespace {

class SeedOfTests : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo& /*test*/) override {
    at::manual_seed(static_cast<uint64_t>(GTEST_FLAG_GET(random_seed)));
  }
};

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  ::testing::UnitTest::GetInstance()->listeners().Append(new SeedOfTests);  // which owns it
  return RUN_ALL_TESTS();
}
