// SPDX-License-Identifier: Apache-2.0
// What config.json says about weights that are stored in 8 or 4 bits.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace xgdn {

/// How the parts of a weight [O, D] lie in a file, and how many elements share a scale.
struct QuantizationScheme {
  /// Names, dtypes and shapes of the parts; n codes share a word of 32 bits.
  enum class Layout {
    kFloat8,      // weight [O, D] float8_e4m3fn, weight_scale_inv or weight_scale
    kInt8,        // weight [O, D] i8, weight_scale, weight_zero_point
    kPackedRows,  // weight_packed [O, D / n] i32, weight_scale, weight_zero_point [O / n, G], weight_shape
    kGptq,        // qweight [D / n, O] i32, qzeros [G, O / n], scales [G, O], g_idx [D]
    kAwq,         // qweight [D, O / n] i32 in AWQ's order of nibbles, qzeros [G, O / n], scales [G, O]
  };
  static constexpr int64_t kWhole = -1;  // all rows, or all columns

  Layout layout = Layout::kFloat8;
  int64_t bits = 8;                 // 4 or 8
  int64_t scale_rows = 1;           // rows that share a scale, or kWhole
  int64_t scale_columns = kWhole;   // columns that do: a multiple of 32, or kWhole
  bool is_symmetric = true;         // the zero point is the middle of the range
  bool has_column_order = false;    // g_idx says to which group a column belongs
  bool has_zeros_less_one = false;  // the file holds zero points less one, as GPTQ's first format does

  /// Field by field.
  bool operator==(const QuantizationScheme&) const = default;
};

/// The schemes of a checkpoint's modules. Which weights are quantized at all is for the tensors to say.
class QuantizationConfig {
 public:
  /// Of a checkpoint whose weights are plain.
  QuantizationConfig() = default;

  /// Whether config.json speaks of quantized weights.
  bool is_present() const { return others_ || !names_.empty() || !patterns_.empty(); }

  /// The scheme of a module's weight, named as in the file. Throws CheckpointError when the config has none for it, or
  /// several that differ.
  const QuantizationScheme& scheme_of(const std::string& module) const;

 private:
  friend class QuantizationConfigReader;

  // Modules whose names begin with a match of a pattern.
  struct Rule {
    std::string pattern;
    std::function<bool(const std::string&)> matches;
    QuantizationScheme scheme;
  };

  // As compressed-tensors has it, a name decides before a pattern, and a pattern before a class of modules.
  std::filesystem::path file_;
  std::map<std::string, QuantizationScheme, std::less<>> names_;  // of modules, bare
  std::vector<Rule> patterns_;
  std::optional<QuantizationScheme> others_;
};

/// Parses quantization_config, or compression_config as older files call it, at the outer level of config.json or in
/// text_config. Knows the methods fp8, gptq, awq and compressed-tensors; activations and the cache are kept in 16 or 32
/// bits whatever the file says of theirs. Throws CheckpointError, naming the key and what is known, for other methods
/// and settings.
QuantizationConfig read_quantization_config(const std::filesystem::path& dir);

}  // namespace xgdn
