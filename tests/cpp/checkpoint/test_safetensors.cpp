// SPDX-License-Identifier: Apache-2.0
// Round trips of hand-written safetensors files, and the refusal of every way such a file can lie.
#include "core/checkpoint/safetensors.h"

#include <ATen/core/Tensor.h>

#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/cpp/support/checkpoint_files.h"

namespace xgdn {
namespace {

using testing::expect_refused;
using testing::safetensors_bytes;
using testing::TemporaryDirectory;

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// Pads as writers do, so that the data begin at a multiple of 8.
std::string aligned(std::string header) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return header;
}

class SafetensorsTest : public ::testing::Test {
 protected:
  SafetensorsFile open(const std::string& bytes) { return SafetensorsFile(dir_.write("w.safetensors", bytes)); }

  void refuse_bytes(const std::string& bytes, std::initializer_list<std::string_view> words) {
    const auto file = dir_.write("w.safetensors", bytes);
    expect_refused([&] { SafetensorsFile opened(file); }, words);
    expect_refused([&] { SafetensorsFile opened(file); }, {"[checkpoint]", file.native(), "expected", "got"});
  }

  void refuse(const std::string& header, const std::string& data, std::initializer_list<std::string_view> words) {
    refuse_bytes(safetensors_bytes(header, data), words);
  }

  TemporaryDirectory dir_;
};

TEST_F(SafetensorsTest, RoundTrip) {
  const std::vector<float> f32 = {1.5F, -2.0F, 3.25F, 0.0F, -0.5F, 8.0F};
  const std::vector<int64_t> i64 = {-1, int64_t{1} << 40};
  const std::vector<uint16_t> bf16 = {0x3f80, 0xc000, 0x3f00};  // 1, -2, 0.5
  const std::vector<uint16_t> f16 = {0x3c00, 0xc000};           // 1, -2
  const std::vector<double> f64 = {0.1};
  const std::vector<int8_t> i8 = {-5, 5};
  const SafetensorsFile file = open(
      safetensors_bytes(aligned(R"({"__metadata__":{"format":"pt"},
        "i64":{"dtype":"I64","shape":[2],"data_offsets":[24,40]},
        "f32":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "scalar":{"dtype":"F64","shape":[],"data_offsets":[40,48]},
        "bf16":{"dtype":"BF16","shape":[3,1],"data_offsets":[48,54]},
        "f16":{"dtype":"F16","shape":[2],"data_offsets":[54,58]},
        "empty":{"dtype":"F32","shape":[0,4],"data_offsets":[58,58]},
        "i8":{"dtype":"I8","shape":[2],"data_offsets":[58,60]}})"),
                        bytes_of(f32) + bytes_of(i64) + bytes_of(f64) + bytes_of(bf16) + bytes_of(f16) + bytes_of(i8)));
  EXPECT_EQ(file.entries().size(), 7U);
  EXPECT_TRUE(file.contains("f32"));
  EXPECT_FALSE(file.contains("__metadata__"));

  const at::Tensor m = file.tensor("f32");
  EXPECT_EQ(m.sizes(), at::IntArrayRef({2, 3}));
  EXPECT_EQ(m.scalar_type(), at::kFloat);
  EXPECT_EQ(std::memcmp(m.const_data_ptr(), f32.data(), 24), 0);
  EXPECT_EQ(m.const_data_ptr(), file.tensor("f32").const_data_ptr()) << "expected a view of the mapping, not a copy";
  EXPECT_EQ(file.tensor("i64").const_data_ptr<int64_t>()[1], int64_t{1} << 40);
  EXPECT_EQ(file.tensor("scalar").dim(), 0);
  EXPECT_EQ(*file.tensor("scalar").const_data_ptr<double>(), 0.1);
  EXPECT_EQ(file.tensor("bf16").scalar_type(), at::kBFloat16);
  EXPECT_EQ(static_cast<float>(file.tensor("bf16").const_data_ptr<at::BFloat16>()[1]), -2.0F);
  EXPECT_EQ(static_cast<float>(file.tensor("f16").const_data_ptr<at::Half>()[0]), 1.0F);
  EXPECT_EQ(file.tensor("empty").sizes(), at::IntArrayRef({0, 4}));
  EXPECT_EQ(file.tensor("i8").const_data_ptr<int8_t>()[0], -5);
  EXPECT_EQ(file.entry("f16").num_bytes(), 4);
}

TEST_F(SafetensorsTest, MisalignedTensorIsCopied) {
  const std::string header = aligned(R"({"pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                     R"("x":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})");
  const SafetensorsFile file = open(safetensors_bytes(header, "\x07" + bytes_of<float>({1.0F, 2.0F})));
  const at::Tensor x = file.tensor("x");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 4, 0U);
  EXPECT_EQ(x.const_data_ptr<float>()[0], 1.0F);
  EXPECT_EQ(x.const_data_ptr<float>()[1], 2.0F);
}

TEST_F(SafetensorsTest, TensorOutlivesTheFileAndItsRelease) {
  std::vector<float> values(64 * 1024);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  std::optional<SafetensorsFile> file = open(safetensors_bytes(
      aligned(R"({"x":{"dtype":"F32","shape":[65536],"data_offsets":[0,262144]}})"), bytes_of(values)));
  const at::Tensor x = file->tensor("x");
  file->release("x");
  EXPECT_EQ(std::memcmp(x.const_data_ptr(), values.data(), values.size() * 4), 0) << "pages come back after release";
  file.reset();
  EXPECT_EQ(std::memcmp(x.const_data_ptr(), values.data(), values.size() * 4), 0);
}

TEST_F(SafetensorsTest, EmptyObjectIsAFileWithoutTensors) {
  EXPECT_TRUE(open(safetensors_bytes("{}", "")).entries().empty());
}

TEST_F(SafetensorsTest, MissingTensorIsNamed) {
  const SafetensorsFile file = open(safetensors_bytes("{}", ""));
  expect_refused([&] { file.tensor("absent"); }, {"'absent'", "expected a tensor of that name"});
  expect_refused([&] { file.release("absent"); }, {"'absent'"});
}

TEST_F(SafetensorsTest, RefusesWhatIsNoFile) {
  expect_refused([&] { SafetensorsFile f(dir_.path() / "none.safetensors"); }, {"none.safetensors", "No such file"});
  expect_refused([&] { SafetensorsFile f(dir_.path()); }, {"a regular file"});
}

TEST_F(SafetensorsTest, RefusesHeaderLengths) {
  refuse_bytes("", {"at least 8 bytes", "got 0"});
  refuse_bytes("1234567", {"at least 8 bytes", "got 7"});
  refuse_bytes(safetensors_bytes("{}", "", 3), {"header: expected 3 bytes", "2 bytes after the length"});
  refuse_bytes(safetensors_bytes("{}", "", int64_t{2} << 30), {"header: expected at most 100 MB", "2147483648 bytes"});
  refuse_bytes(std::string(8, '\xff'), {"at most 100 MB", "18446744073709551615"});
}

TEST_F(SafetensorsTest, RefusesWhatIsNoJsonObject) {
  refuse("", "", {"header", "starts with '{'"});
  refuse("[]", "", {"header", "starts with '{'", "'[]'"});
  refuse("{\"x\":", "", {"valid JSON", "parse_error"});
  refuse("{\"\xff\xfe\": 1}", "", {"valid JSON"});
  refuse("{} {}", "", {"valid JSON"});
  refuse("{\"x\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}", "", {"nested at most"});
}

TEST_F(SafetensorsTest, RefusesDuplicates) {
  const std::string x = R"("x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  refuse("{" + x + "," + x + "}", "1", {"'x'", "once", "duplicate"});
  refuse(R"({"x":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "1", {"'dtype'", "duplicate"});
}

TEST_F(SafetensorsTest, RefusesMalformedEntries) {
  refuse(R"({"x":3})", "", {"tensor 'x'", "an object with dtype", "got 3"});
  refuse(R"({"x":{"shape":[1],"data_offsets":[0,1]}})", "1", {"tensor 'x'", "key dtype"});
  refuse(R"({"x":{"dtype":"U8","data_offsets":[0,1]}})", "1", {"tensor 'x'", "key shape"});
  refuse(R"({"x":{"dtype":"U8","shape":[1]}})", "1", {"tensor 'x'", "key data_offsets"});
  refuse(R"({"x":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}})", "1", {"'x'", "BF16, F16", "'F9'"});
  refuse(R"({"x":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", "1", {"'x'", "whole bytes", "[3]"});
  refuse(R"({"x":{"dtype":7,"shape":[1],"data_offsets":[0,1]}})", "1", {"'x'", "dtype one of", "got 7"});
}

TEST_F(SafetensorsTest, KeepsDtypesWithoutElements) {
  const auto file = dir_.write("x.safetensors", safetensors_bytes(R"({"x":{"dtype":"F4","shape":[4],)"
                                                                  R"("data_offsets":[0,2]}})",
                                                                  "12"));
  const SafetensorsFile opened(file);
  EXPECT_EQ(opened.entry("x").dtype_name, "F4");
  EXPECT_EQ(opened.bytes("x"), "12");
  expect_refused([&] { opened.tensor("x"); }, {"'x'", "got F4"});
}

TEST_F(SafetensorsTest, RefusesShapes) {
  const auto entry = [](const std::string& shape) {
    return R"({"x":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[0,4]}})";
  };
  refuse(entry("1"), "1234", {"'x'", "shape as an array", "got 1"});
  refuse(entry("[-1]"), "1234", {"'x'", "non-negative", "got -1"});
  refuse(entry("[1.0]"), "1234", {"'x'", "non-negative integers", "got 1.0"});
  refuse(entry("[true]"), "1234", {"'x'", "non-negative integers", "got true"});
  refuse(entry("[\"1\"]"), "1234", {"'x'", "non-negative integers", "got '1'"});
  refuse(entry("[18446744073709551615]"), "1234", {"'x'", "non-negative integers"});
  refuse(entry("[99999999999999999999999]"), "1234", {"'x'", "non-negative integers"});
  refuse(entry("[4294967296,4294967296]"), "1234", {"'x'", "fit 64 bits", "[4294967296, 4294967296]"});
  refuse(entry("[0,4294967296,4294967296]"), "1234", {"'x'", "fit 64 bits"});
  refuse(entry("[2]"), "1234", {"'x'", "8 bytes", "shape [2]", "span 4"});
  refuse(entry("[0]"), "1234", {"'x'", "0 bytes", "span 4"});
  refuse(R"({"x":{"dtype":"F64","shape":[1],"data_offsets":[0,4]}})", "1234", {"'x'", "8 bytes", "span 4"});
  std::string ones = "[1";
  for (int i = 0; i < 64; ++i) ones += ",1";
  refuse(entry(ones + "]"), "1234", {"'x'", "shape", "an array of 65"});
}

TEST_F(SafetensorsTest, RefusesOffsets) {
  const auto entry = [](const std::string& offsets) {
    return R"({"x":{"dtype":"U8","shape":[4],"data_offsets":)" + offsets + "}}";
  };
  refuse(entry("[0]"), "1234", {"'x'", "two data_offsets"});
  refuse(entry("[0,2,4]"), "1234", {"'x'", "two data_offsets"});
  refuse(entry("4"), "1234", {"'x'", "two data_offsets", "got 4"});
  refuse(entry("[4,0]"), "1234", {"'x'", "ascending", "[4, 0]"});
  refuse(entry("[-4,0]"), "1234", {"'x'", "ascending integers", "[-4, 0]"});
  refuse(entry("[0,4.0]"), "1234", {"'x'", "ascending integers", "4.0"});
  refuse(entry("[0,\"4\"]"), "1234", {"'x'", "ascending integers"});
  refuse(entry("[1,5]"), "1234", {"'x'", "the file's 4 bytes", "[1, 5]"});
  refuse(entry("[9223372036854775803,9223372036854775807]"), "1234", {"'x'", "the file's 4 bytes"});
  refuse(entry("[0,18446744073709551615]"), "1234", {"'x'", "ascending integers"});
}

TEST_F(SafetensorsTest, RefusesOverlapsAndHoles) {
  const auto two = [](const std::string& a, const std::string& b) {
    return R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + a +
           R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + b + "}}";
  };
  refuse(two("[0,2]", "[1,3]"), "123", {"tensor 'b'", "begin at offset 2", "got 1, an overlap"});
  refuse(two("[0,2]", "[0,2]"), "12", {"tensor 'b'", "an overlap"});
  refuse(two("[2,4]", "[1,3]"), "1234", {"tensor 'b'", "begin at offset 0", "got 1, a hole"});
  refuse(two("[0,2]", "[3,5]"), "12345", {"tensor 'b'", "begin at offset 2", "got 3, a hole"});
  refuse(two("[0,2]", "[2,4]"), "12345", {"end of the file", "1 bytes that belong to no tensor"});
  refuse("{}", "1", {"end of the file", "1 bytes"});
}

TEST_F(SafetensorsTest, HostileNamesStayPrintable) {
  refuse("{\"\\u0007" + std::string(5000, 'n') + "\":1}", "", {"tensor '?nnn", "...'"});
}

// Sums every element's bytes, so that a range outside the mapping would be touched.
int touch(const SafetensorsFile& file) {
  int sum = 0;
  for (const auto& [name, entry] : file.entries()) {
    const at::Tensor x = file.tensor(name);
    const auto* bytes = static_cast<const unsigned char*>(x.const_data_ptr());
    for (size_t i = 0; i < x.nbytes(); ++i) sum += bytes[i];
    file.release(name);
  }
  return sum;
}

TEST_F(SafetensorsTest, MutatedHeadersLoadOrThrow) {
  const std::string header = aligned(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                                     R"("b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}})");
  const std::string valid = safetensors_bytes(header, std::string(32, '\x11'));
  const size_t mutable_bytes = 8 + header.size();
  const std::string likely = "0123456789-.[]{},:\"eE \xff";
  std::mt19937 random(7);
  int loaded = 0;
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = valid;
    for (unsigned n = 1 + random() % 3; n > 0; --n) {
      const size_t at = random() % mutable_bytes;
      bytes[at] = random() % 4 == 0 ? static_cast<char>(random()) : likely[random() % likely.size()];
    }
    if (round % 5 == 0) bytes.resize(random() % bytes.size());
    try {
      touch(open(bytes));
      ++loaded;
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  EXPECT_EQ(loaded + refused, 2000) << "anything but a CheckpointError ends the test";
  EXPECT_GT(refused, 1000);
  EXPECT_GT(loaded, 0) << "no mutation reached the tensors";
}

}  // namespace
}  // namespace xgdn
