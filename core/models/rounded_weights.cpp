// SPDX-License-Identifier: Apache-2.0
#include "core/models/rounded_weights.h"

#include <algorithm>
#include <array>
#include <string_view>

namespace xgdn {
namespace {

using kernel::WeightFormat;

constexpr std::array<std::string_view, 12> kProducts = {"in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj",
                                                        "q_proj",      "k_proj",    "v_proj",       "o_proj",
                                                        "gate_proj",   "up_proj",   "down_proj",    "gate_up_proj"};
constexpr std::array<std::string_view, 2> kHeads = {"lm_head", "embed_tokens"};  // a tied head is asked for as either

std::string_view module_of(std::string_view name) {
  constexpr std::string_view kWeight = ".weight";
  if (name.ends_with(kWeight)) name.remove_suffix(kWeight.size());
  return name.substr(name.rfind('.') + 1);
}

// The largest size of groups that the columns have, or 0.
int64_t group_size(WeightFormat format, int64_t columns) {
  if (format == WeightFormat::kInt8 && columns % 64 == 0) return 64;
  return columns % 32 == 0 ? 32 : 0;
}

}  // namespace

std::optional<Rounding> rounding_of(const std::string& name, at::IntArrayRef shape, WeightFormat asked) {
  const std::string_view module = module_of(name);
  const bool is_head = std::ranges::count(kHeads, module) > 0;
  if (!is_head && std::ranges::count(kProducts, module) == 0) return std::nullopt;
  const WeightFormat format = is_head ? WeightFormat::kInt8 : asked;
  const int64_t size = group_size(format, shape.back());
  if (size == 0) return std::nullopt;
  return Rounding{format, size};
}

std::optional<kernel::QuantizedRows> RoundedWeights::quantized(const std::string& name, at::IntArrayRef shape) const {
  std::optional<kernel::QuantizedRows> rows = format_ ? rounded(name, shape) : stored_.quantized(name, shape);
  if (rows) rows->activation_bits = activation_bits_;
  return rows;
}

std::optional<kernel::QuantizedRows> RoundedWeights::rounded(const std::string& name, at::IntArrayRef shape) const {
  if (stored_.quantized(name, shape)) {
    throw UnsupportedError("[Engine] quantize: expected a checkpoint of plain weights, got a quantized " + name);
  }
  const std::optional<Rounding> rounding = rounding_of(name, shape, *format_);
  if (!rounding) return std::nullopt;
  at::Tensor weight = stored_.get(name, shape).flatten(0, -2);
  if (weight.scalar_type() == at::kDouble) weight = weight.to(at::kFloat);
  try {
    return kernel::quantize_rows(weight, rounding->format, rounding->group_size);
  } catch (const RangeError& error) {
    throw CheckpointError("[Engine] quantize: " + name + ": " + error.what());
  }
}

}  // namespace xgdn
