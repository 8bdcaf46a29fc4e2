// SPDX-License-Identifier: Apache-2.0
// Weights in 8 and 4 bits as quantizers store them: each scheme is written here element by element, and what the
// checkpoint gives is compared with codes, zero points and scales in double precision.
#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/checkpoint/checkpoint.h"
#include "core/checkpoint/quantization_config.h"
#include "tests/cpp/support/tiny_checkpoint.h"

namespace xgdn {
namespace {

using nlohmann::json;
using testing::expect_refused;
using testing::TemporaryDirectory;
using testing::Weights;

const std::string kName = "model.layers.0.mlp.up_proj.weight";
const std::string kModule = "model.layers.0.mlp.up_proj.";

// A weight as numbers: element (o, d) is scales(o, group(d)) * (codes(o, d) - zeros(o, group(d))).
struct Numbers {
  int64_t rows, columns, group;
  int bits;
  std::vector<int> codes;       // [rows, columns], from 0
  std::vector<int> zeros;       // [rows, groups], from 0
  std::vector<float> scales;    // [rows, groups]
  std::vector<int> group_of{};  // per column

  int64_t groups() const { return columns / group; }
  double at(int64_t o, int64_t d) const {
    const int64_t g = group_of[static_cast<size_t>(d)];
    const auto i = static_cast<size_t>(o * groups() + g);
    return static_cast<double>(scales[i]) * (codes[static_cast<size_t>(o * columns + d)] - zeros[i]);
  }
};

Numbers random_numbers(int64_t rows, int64_t columns, int64_t group, int bits, int least_zero, int most_zero) {
  std::mt19937 random(static_cast<uint32_t>(rows * 31 + columns + bits));
  Numbers n{rows, columns, group, bits, {}, {}, {}};
  for (int64_t i = 0; i < rows * columns; ++i) {
    n.codes.push_back(std::uniform_int_distribution<int>(0, (1 << bits) - 1)(random));
  }
  for (int64_t i = 0; i < rows * n.groups(); ++i) {
    n.zeros.push_back(std::uniform_int_distribution<int>(least_zero, most_zero)(random));
    n.scales.push_back(static_cast<float>(std::uniform_int_distribution<int>(1, 255)(random)) / 1024.0F);
  }
  n.zeros.front() = least_zero;
  n.zeros.back() = most_zero;
  for (int64_t d = 0; d < columns; ++d) n.group_of.push_back(static_cast<int>(d / group));
  return n;
}

Numbers symmetric(int64_t rows, int64_t columns, int64_t group, int bits) {
  return random_numbers(rows, columns, group, bits, 1 << (bits - 1), 1 << (bits - 1));
}

// Columns that belong to groups in no order.
Numbers shuffled(Numbers n) {
  std::mt19937 random(5);
  std::shuffle(n.group_of.begin(), n.group_of.end(), random);
  return n;
}

// Packs value(row, column) of a matrix into words along its rows or columns; slot k of a word holds neighbour order[k].
at::Tensor pack(int64_t rows, int64_t columns, int bits, bool is_along_rows, const std::vector<int>& order,
                const std::function<int(int64_t, int64_t)>& value) {
  const int64_t n = 32 / bits;
  const auto ceil = [n](int64_t size) { return (size + n - 1) / n; };
  const at::Tensor words =
      is_along_rows ? at::zeros({rows, ceil(columns)}, at::kInt) : at::zeros({ceil(rows), columns}, at::kInt);
  auto cells = words.accessor<int32_t, 2>();
  for (int64_t r = 0; r < words.size(0); ++r) {
    for (int64_t c = 0; c < words.size(1); ++c) {
      uint32_t word = 0;
      for (int64_t k = 0; k < n; ++k) {
        const int64_t row = is_along_rows ? r : r * n + order[static_cast<size_t>(k)];
        const int64_t column = is_along_rows ? c * n + order[static_cast<size_t>(k)] : c;
        if (row >= rows || column >= columns) continue;
        word |= (static_cast<uint32_t>(value(row, column)) & ((1U << bits) - 1)) << (k * bits);
      }
      cells[r][c] = static_cast<int32_t>(word);
    }
  }
  return words;
}

const std::vector<int> kInOrder = {0, 1, 2, 3, 4, 5, 6, 7};
const std::vector<int> kAwqOrder = {0, 2, 4, 6, 1, 3, 5, 7};

template <typename T>
at::Tensor matrix(int64_t rows, int64_t columns, at::ScalarType dtype,
                  const std::function<T(int64_t, int64_t)>& value) {
  at::Tensor values = at::empty({rows, columns}, at::kDouble);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) values.mutable_data_ptr<double>()[r * columns + c] = value(r, c);
  }
  return values.to(dtype);
}

Weights write_gptq(const Numbers& n, int less = 1) {
  Weights parts;
  const int64_t groups = n.groups();
  parts[kModule + "qweight"] = pack(n.columns, n.rows, n.bits, false, kInOrder, [&](int64_t d, int64_t o) {
    return n.codes[static_cast<size_t>(o * n.columns + d)];
  });
  parts[kModule + "qzeros"] = pack(groups, n.rows, n.bits, true, kInOrder, [&](int64_t g, int64_t o) {
    return n.zeros[static_cast<size_t>(o * groups + g)] - less;
  });
  parts[kModule + "scales"] = matrix<float>(
      groups, n.rows, at::kHalf, [&](int64_t g, int64_t o) { return n.scales[static_cast<size_t>(o * groups + g)]; });
  parts[kModule + "g_idx"] = at::tensor(n.group_of, at::kInt);
  return parts;
}

Weights write_awq(const Numbers& n) {
  Weights parts;
  const int64_t groups = n.groups();
  parts[kModule + "qweight"] = pack(n.columns, n.rows, 4, true, kAwqOrder, [&](int64_t d, int64_t o) {
    return n.codes[static_cast<size_t>(o * n.columns + d)];
  });
  parts[kModule + "qzeros"] = pack(groups, n.rows, 4, true, kAwqOrder,
                                   [&](int64_t g, int64_t o) { return n.zeros[static_cast<size_t>(o * groups + g)]; });
  parts[kModule + "scales"] = matrix<float>(
      groups, n.rows, at::kHalf, [&](int64_t g, int64_t o) { return n.scales[static_cast<size_t>(o * groups + g)]; });
  return parts;
}

at::Tensor scales_by_row(const Numbers& n, at::ScalarType dtype) {
  return matrix<float>(n.rows, n.groups(), dtype,
                       [&](int64_t o, int64_t g) { return n.scales[static_cast<size_t>(o * n.groups() + g)]; });
}

at::Tensor zeros_by_row(const Numbers& n) {
  return matrix<int>(n.rows, n.groups(), at::kChar, [&](int64_t o, int64_t g) {
    return n.zeros[static_cast<size_t>(o * n.groups() + g)] - (1 << (n.bits - 1));
  });
}

Weights write_packed(const Numbers& n, bool has_zeros) {
  Weights parts;
  parts[kModule + "weight_packed"] = pack(n.rows, n.columns, n.bits, true, kInOrder, [&](int64_t o, int64_t d) {
    return n.codes[static_cast<size_t>(o * n.columns + d)];
  });
  parts[kModule + "weight_scale"] = scales_by_row(n, at::kBFloat16);
  parts[kModule + "weight_shape"] = at::tensor({n.rows, n.columns}, at::kLong);
  if (has_zeros) {
    parts[kModule + "weight_zero_point"] = pack(n.rows, n.groups(), n.bits, false, kInOrder, [&](int64_t o, int64_t g) {
      return n.zeros[static_cast<size_t>(o * n.groups() + g)];
    });
  }
  return parts;
}

Weights write_int8(const Numbers& n, bool has_zeros) {
  Weights parts;
  parts[kName] = matrix<int>(n.rows, n.columns, at::kChar, [&](int64_t o, int64_t d) {
    return n.codes[static_cast<size_t>(o * n.columns + d)] - 128;
  });
  parts[kModule + "weight_scale"] = scales_by_row(n, at::kFloat);
  if (has_zeros) parts[kModule + "weight_zero_point"] = zeros_by_row(n);
  return parts;
}

Weights with(Weights parts, const std::string& part, at::Tensor value) {
  parts[kModule + part] = std::move(value);
  return parts;
}

json packed_config(int bits, int64_t group, bool is_symmetric, const std::string& format = "pack-quantized") {
  json weights = {{"num_bits", bits}, {"type", "int"}, {"symmetric", is_symmetric}};
  weights["strategy"] = group > 0 ? "group" : "channel";
  if (group > 0) weights["group_size"] = group;
  return {{"quant_method", "compressed-tensors"},
          {"format", format},
          {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}};
}

json gptq_config(int bits, int64_t group, bool is_symmetric, const std::string& format = "gptq",
                 bool is_ordered = false) {
  return {{"quant_method", "gptq"},      {"bits", bits},          {"group_size", group}, {"sym", is_symmetric},
          {"checkpoint_format", format}, {"desc_act", is_ordered}};
}

json awq_config(int64_t group) {
  return {{"quant_method", "awq"}, {"bits", 4}, {"group_size", group}, {"version", "gemm"}, {"zero_point", true}};
}

json float_config(json weights) {
  weights.update({{"num_bits", 8}, {"type", "float"}, {"symmetric", true}});
  return {{"quant_method", "compressed-tensors"},
          {"format", "float-quantized"},
          {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}};
}

json fp8_config() {
  return {{"quant_method", "fp8"}, {"activation_scheme", "dynamic"}, {"weight_block_size", {128, 128}}};
}

// The rows as numbers in double precision.
at::Tensor in_double(const kernel::QuantizedRows& rows) {
  const at::Tensor codes = rows.codes.to(at::kDouble);
  const at::Tensor scales = rows.scales.to(at::kDouble);
  at::Tensor weight = at::full_like(codes, std::numeric_limits<double>::quiet_NaN());
  for (int64_t o = 0; o < rows.num_rows(); ++o) {
    for (int64_t d = 0; d < rows.num_columns(); ++d) {
      const int64_t g = d / rows.group_size;
      const double middle = rows.format == kernel::WeightFormat::kInt4 ? 8 : 0;
      const double zero = rows.zeros ? rows.zeros->accessor<int8_t, 2>()[o][g] : middle;
      const int64_t column = rows.order ? rows.order->accessor<int64_t, 1>()[d] : d;
      weight.mutable_data_ptr<double>()[o * rows.num_columns() + column] =
          scales.accessor<double, 2>()[o][g] * (codes.accessor<double, 2>()[o][d] - zero);
    }
  }
  return weight;
}

void expect_same_form(const at::Tensor& shape, const at::Tensor& read) {
  EXPECT_TRUE(shape.is_meta());
  EXPECT_TRUE(read.is_contiguous());
  EXPECT_EQ(shape.sizes(), read.sizes());
  EXPECT_EQ(shape.scalar_type(), read.scalar_type());
}

class QuantizationTest : public ::testing::Test {
 protected:
  void write(const Weights& parts, const json& config) {
    dir_.write("model.safetensors", testing::safetensors(parts));
    dir_.write("config.json", json{{"quantization_config", config}}.dump());
  }

  Checkpoint open() const { return Checkpoint(dir_.path(), read_quantization_config(dir_.path())); }

  // Reads the weight and checks it against `want` [O, D], the header's view of it, and that every part is accounted
  // for.
  kernel::QuantizedRows expect(const Weights& parts, const json& config, const at::Tensor& want,
                               std::vector<int64_t> shape = {}) {
    if (shape.empty()) shape = want.sizes().vec();
    write(parts, config);
    const Checkpoint checkpoint = open();
    EXPECT_TRUE(checkpoint.contains(kName) || checkpoint.contains("experts.up_proj"));
    const std::string name = shape.size() == 3 ? "experts.up_proj" : kName;
    const auto rows = checkpoint.quantized(name, shape);
    if (!rows) {
      ADD_FAILURE() << "a plain weight";
      return {};
    }
    EXPECT_TRUE(at::equal(in_double(*rows), want));
    checkpoint.release(name);
    EXPECT_TRUE(at::equal(in_double(*checkpoint.quantized(name, shape)), want));

    const CheckpointShapes headers(checkpoint);
    const auto shapes = headers.quantized(name, shape);
    EXPECT_EQ(shapes->format, rows->format);
    EXPECT_EQ(shapes->group_size, rows->group_size);
    expect_same_form(shapes->codes, rows->codes);
    expect_same_form(shapes->scales, rows->scales);
    EXPECT_EQ(shapes->zeros.has_value(), rows->zeros.has_value());
    if (rows->zeros) expect_same_form(*shapes->zeros, *rows->zeros);
    EXPECT_EQ(shapes->order.has_value(), rows->order.has_value());
    if (rows->order) expect_same_form(*shapes->order, *rows->order);
    EXPECT_EQ(std::vector<std::string>(headers.asked().begin(), headers.asked().end()), checkpoint.names());
    return *rows;
  }

  kernel::QuantizedRows expect(const Weights& parts, const json& config, const Numbers& n) {
    return expect(parts, config,
                  matrix<double>(n.rows, n.columns, at::kDouble, [&](int64_t o, int64_t d) { return n.at(o, d); }));
  }

  void refuse(const Weights& parts, const json& config, at::IntArrayRef shape,
              std::initializer_list<std::string_view> words) {
    write(parts, config);
    expect_refused([&] { open().quantized(kName, shape); }, words);
    expect_refused([&] { open().quantized(kName, shape); }, {"[checkpoint]", "expected", "got", dir_.path().native()});
  }

  void refuse_config(const json& config, std::initializer_list<std::string_view> words) {
    dir_.write("config.json", json{{"quantization_config", config}}.dump());
    expect_refused([&] { read_quantization_config(dir_.path()); }, words);
  }

  TemporaryDirectory dir_;
};

TEST_F(QuantizationTest, Gptq) {
  const Numbers four = symmetric(24, 96, 32, 4);
  EXPECT_FALSE(expect(write_gptq(four), gptq_config(4, 32, true), four).zeros);
  const Numbers eight = symmetric(12, 128, 64, 8);
  EXPECT_EQ(expect(write_gptq(eight), gptq_config(8, 64, true), eight).group_size, 64);
  const Numbers first = random_numbers(136, 256, 128, 4, 1, 15);
  EXPECT_TRUE(expect(write_gptq(first), gptq_config(4, 128, false), first).zeros);
  const Numbers bytes = random_numbers(8, 64, 32, 8, 1, 255);
  expect(write_gptq(bytes), gptq_config(8, 32, false), bytes);
}

TEST_F(QuantizationTest, GptqStoresZeroPointsOfItsSecondFormatAsTheyAre) {
  const Numbers four = random_numbers(8, 64, 32, 4, 0, 15);
  expect(write_gptq(four, 0), gptq_config(4, 32, false, "gptq_v2"), four);
  const Numbers eight = random_numbers(8, 64, 32, 8, 0, 255);
  expect(write_gptq(eight, 0), gptq_config(8, 32, false, "gptq_v2"), eight);
}

TEST_F(QuantizationTest, LargeGroupsAreGivenAsSmallerOnes) {
  const Numbers whole = random_numbers(8, 96, 96, 4, 1, 15);
  EXPECT_EQ(expect(write_gptq(whole), gptq_config(4, -1, false), whole).group_size, 32);
  const Numbers wide = symmetric(8, 512, 256, 4);
  EXPECT_EQ(expect(write_gptq(wide), gptq_config(4, 256, true), wide).group_size, 128);
  const Numbers channel = symmetric(8, 192, 192, 8);
  EXPECT_EQ(expect(write_packed(channel, false), packed_config(8, -1, true), channel).group_size, 64);
}

TEST_F(QuantizationTest, ColumnsInTheOrderOfTheirGroups) {
  const Numbers four = shuffled(random_numbers(16, 128, 32, 4, 1, 15));
  EXPECT_TRUE(expect(write_gptq(four), gptq_config(4, 32, false, "gptq", true), four).order);
  const Numbers eight = shuffled(symmetric(16, 128, 32, 8));
  json config = packed_config(8, 32, true);
  config["config_groups"]["group_0"]["weights"]["actorder"] = "group";
  const Weights parts = with(write_packed(eight, false), "weight_g_idx", at::tensor(eight.group_of, at::kInt));
  EXPECT_TRUE(expect(parts, config, eight).order);

  const Numbers whole = symmetric(8, 64, 64, 4);  // one group has no order
  EXPECT_FALSE(expect(write_gptq(whole), gptq_config(4, -1, true, "gptq", true), whole).order);
  const Weights unset = with(write_packed(whole, false), "weight_g_idx", at::full({64}, -1, at::kInt));
  EXPECT_FALSE(expect(unset, packed_config(4, 64, true), whole).order);
}

TEST_F(QuantizationTest, Awq) {
  for (const int64_t group : {32, 64, 128}) {
    const Numbers n = random_numbers(24, 384, group, 4, 0, 15);
    EXPECT_EQ(expect(write_awq(n), awq_config(group), n).group_size, group);
  }
}

TEST_F(QuantizationTest, CompressedTensorsPacked) {
  const Numbers plain = symmetric(12, 96, 32, 4);
  expect(write_packed(plain, false), packed_config(4, 32, true), plain);
  const Numbers shifted = random_numbers(13, 96, 32, 4, 0, 15);  // rows that do not fill the last word of zero points
  expect(write_packed(shifted, true), packed_config(4, 32, false), shifted);
  expect(with(write_packed(shifted, true), "weight_zero_point", zeros_by_row(shifted)), packed_config(4, 32, false),
         shifted);
  const Numbers bytes = random_numbers(6, 128, 128, 8, 0, 255);
  expect(write_packed(bytes, true), packed_config(8, 128, false), bytes);
}

TEST_F(QuantizationTest, CompressedTensorsInt8) {
  const Numbers channel = symmetric(12, 128, 128, 8);
  const json config = packed_config(8, -1, true, "int-quantized");
  expect(write_int8(channel, false), config, channel);
  expect(with(write_int8(channel, false), "weight_scale", scales_by_row(channel, at::kFloat).squeeze(1)), config,
         channel);
  const Numbers shifted = random_numbers(12, 128, 32, 8, 0, 255);
  expect(write_int8(shifted, true), packed_config(8, 32, false, "naive-quantized"), shifted);
}

TEST_F(QuantizationTest, Float8) {
  const int64_t rows = 200;
  const int64_t columns = 192;
  const at::Tensor codes = at::randn({2 * rows, columns}).to(at::kFloat8_e4m3fn);
  const at::Tensor wide = codes.to(at::kDouble);
  const auto blocks = [](int64_t count, int64_t size) { return at::arange(count, at::kLong).div(size, "floor"); };
  const auto spread = [&](const at::Tensor& scales) {  // one scale per block of 128 x 128
    return scales.to(at::kDouble).index_select(0, blocks(rows, 128)).index_select(1, blocks(columns, 128));
  };
  const at::Tensor one = wide.narrow(0, 0, rows);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor scales = at::rand({2, 2}).to(dtype);
    const Weights parts = {{kName, codes.narrow(0, 0, rows)}, {kModule + "weight_scale_inv", scales}};
    const kernel::QuantizedRows got = expect(parts, fp8_config(), one * spread(scales));
    EXPECT_EQ(got.group_size, 64);
    EXPECT_EQ(got.scales.scalar_type(), dtype);
    expect({{kName, codes.narrow(0, 0, rows)}, {kModule + "weight_scale", scales}},
           float_config({{"strategy", "block"}, {"block_structure", {128, 128}}}), one * spread(scales));
  }

  const at::Tensor scales = at::rand({2, 2, 2});
  const at::Tensor want = at::cat({one * spread(scales[0]), wide.narrow(0, rows, rows) * spread(scales[1])});
  expect({{"experts.up_proj", codes.view({2, rows, columns})}, {"experts.up_proj_scale_inv", scales}}, fp8_config(),
         want, {2, rows, columns});

  const at::Tensor channel = at::rand({rows, 1}).to(at::kBFloat16);
  expect({{kName, codes.narrow(0, 0, rows)}, {kModule + "weight_scale", channel}},
         float_config({{"strategy", "channel"}}), one * channel.to(at::kDouble));
  const at::Tensor single = at::rand({});
  for (const at::Tensor& scale : {single, single.view({1})}) {
    const Weights parts = {{kName, codes.narrow(0, 0, rows)},
                           {kModule + "weight_scale", scale},
                           {kModule + "input_scale", at::rand({1})}};  // of activations: explained, and not needed
    expect(parts, float_config({{"strategy", "tensor"}}), one * single.to(at::kDouble));
    expect(parts, {{"quant_method", "fp8"}, {"activation_scheme", "static"}}, one * single.to(at::kDouble));
  }
}

TEST_F(QuantizationTest, PlainWeightsStayPlain) {
  const Numbers n = symmetric(8, 64, 32, 4);
  Weights parts = write_gptq(n);
  parts["model.norm.weight"] = at::rand({64});
  parts["lm_head.weight"] = at::rand({8, 64}).to(at::kBFloat16);
  write(parts, gptq_config(4, 32, true));
  const Checkpoint checkpoint = open();
  EXPECT_FALSE(checkpoint.quantized("lm_head.weight", {8, 64}));
  EXPECT_EQ(checkpoint.get("lm_head.weight", {8, 64}).scalar_type(), at::kBFloat16);
  EXPECT_FALSE(checkpoint.contains("model.layers.0.mlp.down_proj.weight"));
  EXPECT_FALSE(checkpoint.is_same(kName, kName));
  EXPECT_EQ(checkpoint.prevailing_dtype(), at::kBFloat16);  // 512 elements against 64: parts do not count
  expect_refused([&] { checkpoint.get(kName, {8, 64}); }, {kName, "up_proj.qweight", "cannot be quantized"});

  dir_.write("config.json", "{}");
  EXPECT_FALSE(open().contains(kName));
  expect_refused([&] { open().get(kName, {8, 64}); }, {kName, "up_proj.qweight", "no quantization_config"});
}

TEST_F(QuantizationTest, ProjectionsOfGatesAreDequantized) {
  for (const std::string name : {"in_proj_a", "in_proj_b", "in_proj_ba"}) {
    const Numbers n = random_numbers(8, 64, 32, 4, 0, 15);
    Weights parts;
    for (const auto& [part, tensor] : write_awq(n)) parts[name + "." + part.substr(kModule.size())] = tensor;
    Weights renamed;
    for (const auto& [part, tensor] : parts) renamed["model.layers.0.linear_attn." + part] = tensor;
    write(renamed, awq_config(32));
    const Checkpoint checkpoint = open();
    const std::string weight = "model.layers.0.linear_attn." + name + ".weight";
    const at::Tensor got = checkpoint.get(weight, {8, 64});
    const at::Tensor want = matrix<double>(8, 64, at::kFloat, [&](int64_t o, int64_t d) { return n.at(o, d); });
    EXPECT_TRUE(at::allclose(got, want, 1e-6, 0));
    EXPECT_FALSE(checkpoint.quantized(weight, {8, 64}));
    const CheckpointShapes headers(checkpoint);
    EXPECT_FALSE(headers.quantized(weight, {8, 64}));
    expect_same_form(headers.get(weight, {8, 64}), got);
    EXPECT_EQ(headers.asked().size(), 3U);
    checkpoint.release(weight);
    EXPECT_TRUE(at::equal(checkpoint.get(weight, {8, 64}), got));
  }
}

TEST_F(QuantizationTest, SchemesOfSeveralGroups) {
  const Numbers four = symmetric(8, 64, 32, 4);
  const Numbers eight = symmetric(8, 64, 64, 8);
  const json four_weights = packed_config(4, 32, true)["config_groups"]["group_0"]["weights"];
  const json eight_weights = packed_config(8, 64, true)["config_groups"]["group_0"]["weights"];
  const auto config = [&](const json& targets, const json& others) {
    json groups = {{"a", {{"targets", others}, {"weights", four_weights}}},
                   {"b", {{"targets", targets}, {"weights", eight_weights}}},
                   {"c", {{"targets", {"Linear"}}, {"weights", nullptr}}}};
    return json{{"quant_method", "compressed-tensors"}, {"format", "pack-quantized"}, {"config_groups", groups}};
  };
  for (const json& targets : {json{"re:.*up_proj$"}, json{"model.language_model.layers.0.mlp.up_proj"},
                              json{"x.y", R"(re:^(?!.*lm_head).*mlp\.(up|gate)_proj)"}}) {
    expect(write_packed(eight, false), config(targets, {"Linear"}), eight);
  }
  expect(write_packed(four, false), config({"re:.*down_proj$", "re:layers.*"}, {"Linear"}), four);
  // A name is narrower than a pattern.
  expect(write_packed(eight, false), config({kModule.substr(0, kModule.size() - 1)}, {"re:.*"}), eight);
  refuse(write_packed(eight, false), config({"re:.*up.*"}, {"re:.*"}), {8, 64}, {"up_proj'", "one scheme", "'.*up.*'"});
  write(write_packed(eight, false), config({"Linear"}, {"LinearBase"}));
  expect_refused([&] { open(); }, {"config_groups", "one group for a class"});
  write(write_packed(eight, false), config({"lm_head"}, {"model.lm_head"}));
  expect_refused([&] { open(); }, {"config_groups", "one group for 'lm_head'"});
  refuse(write_packed(eight, false), config({"re:.*q.*"}, {"a.b"}), {8, 64}, {"up_proj'", "a scheme for", "none"});

  json dynamic = gptq_config(4, 32, true);
  dynamic["dynamic"] = {{"-:.*down", json::object()}, {"+:.*up_proj", {{"bits", 8}, {"group_size", 64}}}};
  expect(write_gptq(eight), dynamic, eight);
  dynamic["dynamic"] = {{".*\\.up", {{"bits", 8}, {"group_size", 64}}}, {"-:.*up", json::object()}};
  expect(write_gptq(eight), dynamic, eight);
  dynamic["dynamic"] = {{"up", {{"bits", 8}}}};  // a match begins where the name does
  expect(write_gptq(four), dynamic, four);
}

TEST_F(QuantizationTest, ConfigAtEitherLevel) {
  const Numbers n = symmetric(8, 64, 32, 4);
  for (const json& document : {json{{"text_config", {{"quantization_config", gptq_config(4, 32, true)}}}},
                               json{{"quantization_config", gptq_config(4, 32, true)},
                                    {"text_config", {{"quantization_config", awq_config(32)}}}}}) {
    dir_.write("model.safetensors", testing::safetensors(write_gptq(n)));
    dir_.write("config.json", document.dump());
    EXPECT_TRUE(open().quantized(kName, {8, 64}));
  }
  json older = packed_config(4, 32, true);
  older.erase("quant_method");
  dir_.write("model.safetensors", testing::safetensors(write_packed(n, false)));
  dir_.write("config.json", json{{"compression_config", older}}.dump());
  EXPECT_TRUE(open().quantized(kName, {8, 64}));
}

TEST_F(QuantizationTest, RefusesMissingParts) {
  const Numbers n = random_numbers(8, 64, 32, 4, 1, 15);
  const std::vector<std::pair<json, Weights>> cases = {
      {gptq_config(4, 32, false, "gptq", true), write_gptq(n)},
      {awq_config(32), write_awq(n)},
      {packed_config(4, 32, false), write_packed(n, true)},
      {packed_config(8, 32, false, "int-quantized"), write_int8(random_numbers(8, 64, 32, 8, 1, 9), true)},
      {fp8_config(),
       {{kName, at::ones({8, 64}).to(at::kFloat8_e4m3fn)}, {kModule + "weight_scale", at::ones({1, 1})}}}};
  for (const auto& [config, whole] : cases) {
    for (const auto& [name, tensor] : whole) {
      Weights parts = whole;
      parts.erase(name);
      refuse(parts, config, {8, 64}, {"tensor '" + name + "'", "a part of the quantized '" + kName + "'", "got none"});
    }
  }
}

TEST_F(QuantizationTest, RefusesShapesAndDtypesThatLie) {
  const Numbers n = random_numbers(8, 64, 32, 4, 1, 15);
  const Weights gptq = write_gptq(n);
  const json config = gptq_config(4, 32, false);
  refuse(with(gptq, "qweight", at::zeros({8, 8})), config, {8, 64}, {"qweight'", "dtype I32", "got F32"});
  refuse(with(gptq, "qzeros", at::zeros({2, 1})), config, {8, 64}, {"qzeros'", "dtype I32", "got F32"});
  refuse(with(gptq, "scales", at::zeros({2, 8}, at::kInt)), config, {8, 64}, {"scales'", "F32 or BF16", "got I32"});
  refuse(with(gptq, "g_idx", at::zeros({64})), config, {8, 64}, {"g_idx'", "I32 or I64", "got F32"});
  refuse(with(gptq, "g_idx", at::zeros({63}, at::kInt)), config, {8, 64}, {"g_idx'", "[64]", "got [63]"});
  refuse(gptq, config, {8, 128}, {"qweight'", "[16, 8]", "got [8, 8]"});
  refuse(gptq, config, {16, 64}, {"qweight'", "[8, 16]", "got [8, 8]"});
  refuse(gptq, gptq_config(8, 32, false), {8, 64}, {"qweight'", "[16, 8]", "got [8, 8]"});
  refuse(gptq, gptq_config(4, 64, false), {8, 64}, {"scales'", "[1, 8]", "got [2, 8]"});
  refuse(gptq, gptq_config(4, 128, false), {8, 64}, {"qweight'", "group_size=128", "got [8, 64]"});
  refuse(gptq, config, {8, 72}, {"qweight'", "a multiple of 32 columns", "got [8, 72]"});
  refuse(gptq, config, {12, 64}, {"qweight'", "a multiple of 8 rows", "got [12, 64]"});
  refuse(with(gptq, "qzeros", at::zeros({2, 2}, at::kInt)), config, {8, 64}, {"qzeros'", "[2, 1]", "got [2, 2]"});
  refuse(write_awq(n), awq_config(64), {8, 64}, {"scales'", "[1, 8]", "got [2, 8]"});
  refuse(with(write_awq(n), "qweight", at::zeros({8, 8}, at::kInt)), awq_config(32), {8, 64}, {"qweight'", "[64, 1]"});

  const Weights packed = write_packed(n, true);
  const json ct = packed_config(4, 32, false);
  refuse(with(packed, "weight_packed", at::zeros({8, 8})), ct, {8, 64}, {"weight_packed'", "dtype I32", "got F32"});
  refuse(packed, packed_config(8, 32, false), {8, 64}, {"weight_packed'", "[8, 16]", "got [8, 8]"});
  refuse(packed, packed_config(4, 64, false), {8, 64}, {"weight_scale'", "[8, 1]", "got [8, 2]"});
  refuse(packed, packed_config(4, -1, false), {8, 64}, {"weight_scale'", "[8, 1]", "got [8, 2]"});
  refuse(with(packed, "weight_zero_point", at::zeros({8, 2}, at::kInt)), ct, {8, 64},
         {"weight_zero_point'", "[1, 2]", "got [8, 2]"});
  refuse(with(packed, "weight_shape", at::tensor({8, 32}, at::kLong)), ct, {8, 64},
         {"weight_shape'", "[8, 64]", "got [8, 32]"});
  refuse(with(packed, "weight_shape", at::tensor({8}, at::kLong)), ct, {8, 64}, {"weight_shape'", "[2]", "got [1]"});
  refuse(with(packed, "weight_shape", at::rand({2})), ct, {8, 64}, {"weight_shape'", "I64 or I32", "got F32"});
  refuse(packed, ct, {2, 8, 64}, {"weight_packed'", "two dimensions", "[2, 8, 64]"});

  const Weights fp8 = {{kName, at::ones({8, 64}).to(at::kFloat8_e4m3fn)},
                       {kModule + "weight_scale_inv", at::ones({1, 1})}};
  refuse(fp8, fp8_config(), {8, 32}, {"up_proj.weight'", "[8, 32]", "got [8, 64]"});
  refuse(with(fp8, "weight", at::ones({8, 64})), fp8_config(), {8, 64}, {"up_proj.weight'", "F8_E4M3", "got F32"});
  refuse(with(fp8, "weight", at::ones({8, 64}, at::kChar)), fp8_config(), {8, 64},
         {"up_proj.weight'", "F8_E4M3", "I8"});
  refuse(with(fp8, "weight_scale_inv", at::ones({2, 1})), fp8_config(), {8, 64},
         {"scale_inv'", "[1, 1]", "got [2, 1]"});
  refuse(with(fp8, "weight_scale_inv", at::ones({1})), fp8_config(), {8, 64}, {"scale_inv'", "[1, 1]", "got [1]"});
  refuse(fp8, packed_config(8, -1, true, "int-quantized"), {8, 64}, {"weight_scale'", "none"});
}

TEST_F(QuantizationTest, RefusesElementsOutOfRange) {
  const Numbers n = random_numbers(8, 64, 32, 4, 1, 15);
  const Weights gptq = write_gptq(n);
  const json config = gptq_config(4, 32, false);
  const json ordered = gptq_config(4, 32, false, "gptq", true);
  refuse(with(gptq, "qzeros", at::full({2, 1}, 0x7fffffff, at::kInt)), config, {8, 64},
         {"qzeros'", "zero points from 0 to 15", "got 16"});
  refuse(gptq, gptq_config(4, 32, true), {8, 64}, {"qzeros'", "zero points of 8", "symmetric"});
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    at::Tensor scales = at::ones({2, 8}, at::kHalf);
    scales[1][7] = bad;
    refuse(with(gptq, "scales", scales), config, {8, 64}, {"scales'", "finite", "NaN"});
  }
  const auto group_indices = [&](int64_t column, int64_t group) {
    at::Tensor groups = gptq.at(kModule + "g_idx").clone();
    groups[column] = group;
    return with(gptq, "g_idx", groups);
  };
  refuse(group_indices(5, 2), ordered, {8, 64}, {"g_idx'", "groups from 0 to 1", "got 2"});
  refuse(group_indices(5, -1), ordered, {8, 64}, {"g_idx'", "groups from 0 to 1", "got -1"});
  refuse(group_indices(5, std::numeric_limits<int32_t>::min()), config, {8, 64}, {"g_idx'", "got -2147483648"});
  refuse(group_indices(5, 1), ordered, {8, 64}, {"g_idx'", "32 columns in each group", "more in group 1"});
  refuse(group_indices(5, 1), config, {8, 64}, {"g_idx'", "group 0 of column 5", "got 1"});
  refuse(with(gptq, "g_idx", at::full({64}, -1, at::kInt)), ordered, {8, 64}, {"g_idx'", "got -1"});

  refuse(with(write_packed(n, true), "weight_zero_point", at::full({8, 2}, 8, at::kChar)), packed_config(4, 32, false),
         {8, 64}, {"weight_zero_point'", "zero points from 0 to 15", "got 16"});
  refuse(with(write_packed(n, true), "weight_zero_point", at::full({8, 2}, -9, at::kChar)), packed_config(4, 32, false),
         {8, 64}, {"weight_zero_point'", "zero points from 0 to 15", "got -1"});

  for (const int code : {0x7f, 0xff}) {
    at::Tensor codes = at::zeros({8, 64}, at::kByte);
    codes[7][63] = code;
    const Weights fp8 = {{kName, codes.view(at::kFloat8_e4m3fn)}, {kModule + "weight_scale_inv", at::ones({1, 1})}};
    refuse(fp8, fp8_config(), {8, 64}, {"up_proj.weight'", "numbers", "got NaN"});
  }
}

TEST_F(QuantizationTest, RefusesUnknownMethodsAndSettings) {
  refuse_config({{"quant_method", "bitsandbytes"}},
                {"quantization_config.quant_method", "one of awq, compressed-tensors, fp8, gptq", "'bitsandbytes'"});
  refuse_config(json::object(), {"quantization_config.quant_method", "one of awq", "got nothing"});
  refuse_config(json::array(), {"quantization_config", "an object", "an array"});

  const auto changed = [](json config, const std::string& pointer, const json& value) {
    config[json::json_pointer(pointer)] = value;
    return config;
  };
  const json gptq = gptq_config(4, 32, true);
  refuse_config(changed(gptq, "/bits", 3), {"bits", "4 or 8", "got 3"});
  refuse_config(changed(gptq, "/bits", nullptr), {"bits", "4 or 8", "got nothing"});
  refuse_config(changed(gptq, "/group_size", 16), {"group_size", "a multiple of 32, or -1", "got 16"});
  refuse_config(changed(gptq, "/group_size", 0), {"group_size", "a multiple of 32, or -1", "got 0"});
  refuse_config(changed(gptq, "/group_size", -2), {"group_size", "got -2"});
  refuse_config(changed(gptq, "/checkpoint_format", "marlin"),
                {"checkpoint_format", "one of gptq, gptq_v2", "'marlin'"});
  refuse_config(changed(gptq, "/is_marlin_format", true), {"is_marlin_format", "got true"});
  refuse_config(changed(gptq, "/pack_dtype", "int8"), {"pack_dtype", "int32", "'int8'"});
  refuse_config(changed(gptq, "/dynamic", {{"+:a", {{"bits", 2}}}}), {"dynamic.+:a.bits", "4 or 8", "got 2"});
  refuse_config(changed(gptq, "/dynamic", {{"+:(a", {{"bits", 8}}}}), {"dynamic.+:(a", "regular expression", "'(a'"});

  const json awq = awq_config(32);
  refuse_config(changed(awq, "/bits", 8), {"bits", "expected 4", "got 8"});
  refuse_config(changed(awq, "/version", "gemv"), {"version", "gemm", "'gemv'"});
  refuse_config(changed(awq, "/backend", "llm-awq"), {"backend", "autoawq", "'llm-awq'"});
  refuse_config(changed(awq, "/zero_point", false), {"zero_point", "true", "got false"});

  const json fp8 = fp8_config();
  refuse_config(changed(fp8, "/fmt", "e5m2"), {"fmt", "e4m3", "'e5m2'"});
  refuse_config(changed(fp8, "/scale_fmt", "ue8m0"), {"scale_fmt", "float", "'ue8m0'"});
  refuse_config(changed(fp8, "/weight_block_size", {128, 100}), {"weight_block_size", "a multiple of 32", "[128,100]"});
  refuse_config(changed(fp8, "/weight_block_size", {128}), {"weight_block_size", "[rows, columns]"});

  const json packed = packed_config(4, 32, true);
  const std::string group = "/config_groups/group_0";
  refuse_config(changed(packed, "/format", "nvfp4-pack-quantized"), {"format", "one of float-quantized", "'nvfp4"});
  refuse_config(changed(packed, "/format", nullptr), {"format", "one of float-quantized", "got nothing"});
  refuse_config(changed(packed, group + "/format", "marlin-24"), {"group_0.format", "pack-quantized", "'marlin-24'"});
  refuse_config(changed(packed, group + "/weights/num_bits", 2), {"weights.num_bits", "4 or 8", "got 2"});
  refuse_config(changed(packed, group + "/weights/type", "float"), {"weights.type", "'int' in format pack-quantized"});
  refuse_config(changed(packed, group + "/weights/strategy", "tensor_group"), {"weights.strategy", "channel, group"});
  refuse_config(changed(packed, group + "/weights/strategy", "tensor"), {"weights.strategy", "channel, group"});
  refuse_config(changed(packed, group + "/weights/group_size", 48), {"weights.group_size", "a multiple of 32", "48"});
  refuse_config(changed(packed, group + "/weights/actorder", "none"), {"weights.actorder", "group", "'none'"});
  refuse_config(changed(packed, group + "/targets", "Linear"), {"targets", "an array"});
  refuse_config(changed(packed, group + "/targets", {1}), {"targets", "names of modules", "got 1"});
  refuse_config(changed(packed, group + "/targets", {"re:" + std::string(1001, 'a')}), {"targets", "1000 characters"});
  refuse_config(changed(packed, "/config_groups", json::object()), {"config_groups", "at least one group"});
  refuse_config(changed(packed, group + "/weights", nullptr), {"config_groups", "a group with weights", "none"});
  refuse_config(changed(packed, "/transform_config", {{"config_groups", {{"a", 1}}}}),
                {"transform_config", "rotations"});
  refuse_config(changed(packed, "/sparsity_config", {{"format", "sparse-24-bitmask"}}), {"sparsity_config.format"});
  refuse_config(changed(float_config({{"strategy", "channel"}}), group + "/weights/symmetric", false), {"symmetric"});
  refuse_config(changed(float_config({{"strategy", "channel"}}), group + "/weights/num_bits", 4), {"num_bits", "8"});
  refuse_config(float_config({{"strategy", "block"}}), {"block_structure", "[rows, columns]"});
}

// A pattern that would take an engine that backtracks longer than anyone waits.
TEST_F(QuantizationTest, HostilePatternsEndInTime) {
  json config = packed_config(4, 32, true);
  config["config_groups"]["b"] = config["config_groups"]["group_0"];
  config["config_groups"]["b"]["targets"] = {"re:(([a-z._0-9]+)*)*=$"};
  config["config_groups"]["b"]["weights"]["num_bits"] = 8;
  const Numbers n = symmetric(8, 64, 32, 4);
  expect(write_packed(n, false), config, n);
}

}  // namespace
}  // namespace xgdn
