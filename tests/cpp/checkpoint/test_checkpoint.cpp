// SPDX-License-Identifier: Apache-2.0
// Checkpoint directories: one file, shards with an index, and what is refused of either.
#include "core/checkpoint/checkpoint.h"

#include <ATen/core/Tensor.h>

#include <cstring>
#include <string>

#include "tests/cpp/support/checkpoint_files.h"

namespace xgdn {
namespace {

using testing::expect_refused;
using testing::safetensors_bytes;
using testing::TemporaryDirectory;

// A file with one float tensor of two elements per name, the bytes of each all equal to `fill`; 8 bytes per tensor.
std::string shard_of(std::initializer_list<std::string> names, char fill) {
  std::string header = "{";
  size_t offset = 0;
  for (const std::string& name : names) {
    header += (offset > 0 ? ",\"" : "\"") + name + R"(":{"dtype":"F32","shape":[2],"data_offsets":[)" +
              std::to_string(offset) + "," + std::to_string(offset + 8) + "]}";
    offset += 8;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return safetensors_bytes(header, std::string(offset, fill));
}

class CheckpointTest : public ::testing::Test {
 protected:
  void write_index(const std::string& weight_map) {
    dir_.write("model.safetensors.index.json", R"({"metadata":{"total_size":1},"weight_map":)" + weight_map + "}");
  }

  void refuse(std::initializer_list<std::string_view> words) {
    expect_refused([&] { Checkpoint opened(dir_.path()); }, words);
    expect_refused([&] { Checkpoint opened(dir_.path()); }, {"[checkpoint]", dir_.path().native(), "expected", "got"});
  }

  TemporaryDirectory dir_;
};

TEST_F(CheckpointTest, SingleFile) {
  dir_.write("model.safetensors", shard_of({"b", "a"}, 1));
  const Checkpoint checkpoint(dir_.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(checkpoint.total_bytes(), 16);
  EXPECT_TRUE(checkpoint.contains("a"));
  EXPECT_FALSE(checkpoint.contains("c"));
  const at::Tensor a = checkpoint.get("a", {2});
  EXPECT_EQ(std::memcmp(a.const_data_ptr(), "\1\1\1\1\1\1\1\1", 8), 0);
  checkpoint.release("a");
  EXPECT_EQ(std::memcmp(a.const_data_ptr(), "\1\1\1\1\1\1\1\1", 8), 0);
}

TEST_F(CheckpointTest, Shards) {
  dir_.write("m-1.safetensors", shard_of({"a", "b"}, 1));
  dir_.write("m-2.safetensors", shard_of({"c"}, 2));
  write_index(R"({"a":"m-1.safetensors","b":"m-1.safetensors","c":"m-2.safetensors"})");
  const Checkpoint checkpoint(dir_.path());
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(checkpoint.total_bytes(), 24);
  EXPECT_EQ(*static_cast<const char*>(checkpoint.get("b", {2}).const_data_ptr()), 1);
  EXPECT_EQ(*static_cast<const char*>(checkpoint.get("c", {2}).const_data_ptr()), 2);
}

TEST_F(CheckpointTest, TensorsOutliveTheCheckpoint) {
  dir_.write("model.safetensors", shard_of({"a"}, 3));
  at::Tensor a;
  {
    const Checkpoint checkpoint(dir_.path());
    a = checkpoint.get("a", {2});
  }
  EXPECT_EQ(*static_cast<const char*>(a.const_data_ptr()), 3);
}

TEST_F(CheckpointTest, GetChecksNameShapeAndDtype) {
  dir_.write("model.safetensors", safetensors_bytes(R"({"w":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},)"
                                                    R"("ids":{"dtype":"I32","shape":[1],"data_offsets":[4,8]}})",
                                                    "12345678"));
  const Checkpoint checkpoint(dir_.path());
  EXPECT_EQ(checkpoint.get("w", {2, 1}).scalar_type(), at::kBFloat16);
  expect_refused([&] { checkpoint.get("v", {2, 1}); }, {dir_.path().native(), "tensor 'v'", "of that name", "none"});
  expect_refused([&] { checkpoint.release("v"); }, {"tensor 'v'"});
  expect_refused([&] { checkpoint.get("w", {1, 2}); }, {"model.safetensors", "'w'", "expected [1, 2]", "got [2, 1]"});
  expect_refused([&] { checkpoint.get("w", {2}); }, {"'w'", "expected [2]", "got [2, 1]"});
  expect_refused([&] { checkpoint.get("w", {}); }, {"'w'", "expected []", "got [2, 1]"});
  expect_refused([&] { checkpoint.get("ids", {1}); }, {"'ids'", "BF16, F16, F32 or F64", "got I32"});
}

TEST_F(CheckpointTest, FindsTensorsUnderAnyWrapper) {
  dir_.write("model.safetensors", shard_of({"language_model.model.a", "model.language_model.b", "c", "mtp.a"}, 1));
  const Checkpoint checkpoint(dir_.path());
  for (const std::string name : {"a", "b", "c"}) {
    for (const std::string prefix : {"", "model.", "model.language_model."}) {
      EXPECT_TRUE(checkpoint.contains(prefix + name));
      EXPECT_EQ(checkpoint.get(prefix + name, {2}).numel(), 2);
    }
  }
  EXPECT_EQ(checkpoint.stored_name("model.a"), "language_model.model.a");
  EXPECT_TRUE(checkpoint.is_same("model.a", "model.b"));
  EXPECT_FALSE(checkpoint.is_same("model.a", "model.d"));
}

TEST_F(CheckpointTest, SaysUnderWhichOtherNameATensorIs) {
  dir_.write("model.safetensors", shard_of({"module.model.x.weight", "mtp.x.weight", "y.qweight", "y.scales"}, 1));
  const Checkpoint checkpoint(dir_.path());
  expect_refused([&] { checkpoint.get("model.x.weight", {2}); }, {"'model.x.weight'", "but 'module.model.x.weight'"});
  expect_refused([&] { checkpoint.get("model.y.weight", {2}); }, {"'y.qweight', 'y.scales'", "quantization_config"});
  expect_refused([&] { checkpoint.get("model.z.weight", {2}); }, {"'model.z.weight'", "got none"});
}

TEST_F(CheckpointTest, PrevailingDtypeIsThatOfMostElementsOfTheDecoder) {
  const std::string big = R"("mtp.w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]})";
  const std::string few = R"("model.A_log":{"dtype":"F32","shape":[1],"data_offsets":[16,20]})";
  const std::string many = R"("model.w":{"dtype":"BF16","shape":[2],"data_offsets":[20,24]})";
  dir_.write("model.safetensors", safetensors_bytes("{" + big + "," + few + "," + many + "}", std::string(24, '\0')));
  EXPECT_EQ(Checkpoint(dir_.path()).prevailing_dtype(), at::kBFloat16);
  dir_.write("model.safetensors", shard_of({"mtp.w"}, 1));
  EXPECT_EQ(Checkpoint(dir_.path()).prevailing_dtype(), at::kFloat);
}

TEST_F(CheckpointTest, NamesOfQuantizers) {
  for (const std::string name : {"weight_scale_inv", "scales", "qweight", "g_idx", "SCB", "weight.absmax",
                                 "weight.quant_state.bitsandbytes__nf4", "input_quantizer._amax", "zero_point"}) {
    EXPECT_TRUE(is_quantizer_part(name)) << name;
  }
  for (const std::string name : {"weight", "bias", "lora_A.weight", "lora_scaling", "A_log", "dt_bias", "inv_freq"}) {
    EXPECT_FALSE(is_quantizer_part(name)) << name;
  }
}

TEST_F(CheckpointTest, RefusesADirectoryWithoutWeights) {
  refuse({"model.safetensors or model.safetensors.index.json"});
  expect_refused([&] { Checkpoint opened(dir_.path() / "none"); }, {"none", "model.safetensors"});
}

TEST_F(CheckpointTest, RefusesFileNamesThatLeaveTheDirectory) {
  const TemporaryDirectory outside;
  outside.write("m.safetensors", shard_of({"a"}, 1));
  const std::string away = "../" + outside.path().filename().string() + "/m.safetensors";
  dir_.write("m.safetensors", shard_of({"a"}, 1));
  for (const std::string& file :
       {away, (outside.path() / "m.safetensors").string(), std::string("./m.safetensors"), std::string(".."),
        std::string("a..safetensors"), std::string(R"(a\\m.safetensors)"), std::string(""), std::string("m.bin"),
        std::string(R"(m.safetensors\u0000.safetensors)")}) {
    SCOPED_TRACE(file);
    write_index("{\"a\":\"" + file + "\"}");
    refuse({"index.json", "tensor 'a'", "plain file name"});
  }
  write_index(R"({"a":1})");
  refuse({"index.json", "tensor 'a'", "plain file name", "got 1"});
}

TEST_F(CheckpointTest, RefusesAMalformedIndex) {
  write_index("[]");
  refuse({"weight_map", "an object", "an array of 0"});
  dir_.write("model.safetensors.index.json", "{}");
  refuse({"weight_map", "an object", "nothing"});
  dir_.write("model.safetensors.index.json", "[]");
  refuse({"index.json", "an object"});
  dir_.write("model.safetensors.index.json", "{\"weight_map\"");
  refuse({"index.json", "valid JSON"});
  write_index(R"({"a":"m.safetensors","a":"m.safetensors"})");
  refuse({"index.json", "'a'", "duplicate"});
}

TEST_F(CheckpointTest, RefusesShardsThatContradictTheIndex) {
  write_index(R"({"a":"m-1.safetensors"})");
  refuse({"m-1.safetensors", "No such file"});

  dir_.write("m-1.safetensors", shard_of({"b"}, 1));
  refuse({"m-1.safetensors", "tensor 'a'", "as the index says"});

  dir_.write("m-1.safetensors", shard_of({"a", "b"}, 1));
  dir_.write("m-2.safetensors", shard_of({"b"}, 2));
  write_index(R"({"a":"m-1.safetensors","b":"m-2.safetensors"})");
  refuse({"m-2.safetensors", "tensor 'b'", "no other shard", "beside m-1.safetensors"});

  dir_.write("m-1.safetensors", shard_of({"a"}, 1));
  write_index(R"({"a":"m-2.safetensors","b":"m-1.safetensors"})");
  refuse({"tensor 'a'", "as the index says"});
}

TEST_F(CheckpointTest, RefusesADamagedShard) {
  const std::string whole = shard_of({"a"}, 1);
  dir_.write("model.safetensors", whole.substr(0, whole.size() - 1));
  refuse({"model.safetensors", "tensor 'a'", "the file's 7 bytes"});
}

}  // namespace
}  // namespace xgdn
