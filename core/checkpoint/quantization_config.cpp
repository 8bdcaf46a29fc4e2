// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/quantization_config.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <initializer_list>
#include <optional>
#include <regex>
#include <string_view>
#include <utility>

#include "core/checkpoint/checkpoint.h"
#include "core/checkpoint/json_object.h"

namespace xgdn {
namespace {

using nlohmann::json;
using Layout = QuantizationScheme::Layout;

constexpr int64_t kMaxGroup = int64_t{1} << 20;
constexpr size_t kMaxPattern = 1000;
constexpr std::string_view kPatternPrefix = "re:";

std::string one_of(const std::vector<std::string>& names) {
  return "one of " + c10::Join(", ", names);
}

// The string under the first of `keys` that is there, in lower case, checked to be one of `known`.
std::string read_choice(const JsonObject& object, const std::vector<std::string>& keys, std::string value,
                        const std::vector<std::string>& known) {
  const auto key = std::ranges::find_if(keys, [&](const std::string& name) { return object.has(name); });
  if (key == keys.end()) return value;
  object.read(*key, value);
  std::ranges::transform(value, value.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (std::ranges::count(known, value) == 0) throw object.error(*key, one_of(known));
  return value;
}

void require_flag(const JsonObject& object, const std::string& key, bool known, std::string_view why) {
  bool value = known;
  object.read(key, value);
  if (value != known) throw object.error(key, std::string(known ? "true: " : "false: ").append(why));
}

int64_t read_bits(const JsonObject& object, const std::string& key, std::initializer_list<int64_t> known) {
  int64_t bits = 0;
  object.read(key, bits, 1, 64);
  if (std::ranges::count(known, bits) > 0) return bits;
  throw object.error(key, known.size() == 1 ? std::to_string(*known.begin()) : "4 or 8");
}

int64_t read_group_size(const JsonObject& object, const std::string& key) {
  constexpr std::string_view kExpected = "a multiple of 32, or -1 for whole rows";
  if (!object.has(key)) throw object.error(key, kExpected);
  int64_t size = 0;
  object.read(key, size, -1, kMaxGroup);
  if (size != QuantizationScheme::kWhole && (size <= 0 || size % 32 != 0)) throw object.error(key, kExpected);
  return size;
}

// [rows, columns] of the blocks that share a scale.
std::pair<int64_t, int64_t> read_block_size(const JsonObject& object, const std::string& key) {
  constexpr std::string_view kExpected = "[rows, columns], the latter a multiple of 32";
  const json* sizes = object.array(key);
  if (sizes == nullptr || sizes->size() != 2) throw object.error(key, kExpected);
  const std::optional<int64_t> rows = integer_within(sizes->front(), 1, kMaxGroup);
  const std::optional<int64_t> columns = integer_within(sizes->back(), 32, kMaxGroup);
  if (!rows || !columns || *columns % 32 != 0) throw object.error(key, kExpected, sizes->dump());
  return {*rows, *columns};
}

// Whether a name begins with a match. Patterns come from a file: the flag bounds the time of a search by a polynomial.
std::function<bool(const std::string&)> compile(const JsonObject& object, const std::string& key,
                                                const std::string& text) {
  constexpr std::string_view kExpected = "a regular expression of at most 1000 characters";
  if (text.size() > kMaxPattern) throw object.error(key, kExpected, std::to_string(text.size()) + " characters");
  try {
    const std::regex pattern(text, std::regex::ECMAScript | std::regex_constants::__polynomial);
    return [pattern](const std::string& name) {
      return std::regex_search(name, pattern, std::regex_constants::match_continuous);
    };
  } catch (const std::regex_error&) {
    throw object.error(key, kExpected, quote(text));
  }
}

// A weight whose activations would be quantized, too, is computed with activations as they are.
void require_no_rotation(const JsonObject& config) {
  const std::optional<JsonObject> transforms = config.object("transform_config");
  if (transforms && !transforms->value().empty()) {
    throw config.error("transform_config", "none: rotations are not supported");
  }
  const std::optional<JsonObject> sparsity = config.object("sparsity_config");
  if (!sparsity || sparsity->value().empty()) return;
  read_choice(*sparsity, {"format"}, "", {"dense"});
}

}  // namespace

/// Builds a QuantizationConfig from the JSON of one method.
class QuantizationConfigReader {
 public:
  QuantizationConfigReader(const JsonObject& config, const std::filesystem::path& file) : config_(config) {
    result_.file_ = file;
  }

  QuantizationConfig read(std::string default_method) {
    const std::string method =
        read_choice(config_, {"quant_method"}, std::move(default_method), {"awq", "compressed-tensors", "fp8", "gptq"});
    if (method == "awq") {
      read_awq();
    } else if (method == "compressed-tensors") {
      read_compressed_tensors();
    } else if (method == "fp8") {
      read_fp8();
    } else if (method == "gptq") {
      read_gptq();
    } else {
      throw config_.error("quant_method", one_of({"awq", "compressed-tensors", "fp8", "gptq"}));
    }
    simplify();
    return std::move(result_);
  }

 private:
  // Of one class of modules; all weights that are quantized belong to one.
  void add(const QuantizationScheme& scheme) {
    if (result_.others_ && *result_.others_ != scheme) {
      throw config_.error("config_groups", "one group for a class of modules", "several that differ");
    }
    result_.others_ = scheme;
  }
  void add_name(const QuantizationScheme& scheme, const std::string& name) {
    const auto [known, is_new] = result_.names_.emplace(bare_name(name), scheme);
    if (!is_new && known->second != scheme) {
      throw config_.error("config_groups", "one group for " + quote(name), "several that differ");
    }
  }
  void add_pattern(const QuantizationScheme& scheme, const std::string& pattern, const JsonObject& object,
                   const std::string& key) {
    result_.patterns_.push_back({pattern, compile(object, key, pattern), scheme});
  }

  // Where all schemes are alike, as in most files, there is nothing to search for.
  void simplify() {
    std::vector<QuantizationScheme> schemes;
    for (const auto& [name, scheme] : result_.names_) schemes.push_back(scheme);
    for (const auto& rule : result_.patterns_) schemes.push_back(rule.scheme);
    if (result_.others_) schemes.push_back(*result_.others_);
    if (schemes.empty() || std::ranges::count(schemes, schemes.front()) != std::ssize(schemes)) return;
    result_.others_ = schemes.front();
    result_.names_.clear();
    result_.patterns_.clear();
  }

  void read_fp8() {
    read_choice(config_, {"fmt"}, "e4m3", {"e4m3"});
    read_choice(config_, {"scale_fmt"}, "float", {"float"});
    read_choice(config_, {"expert_dtype"}, "fp8", {"fp8"});
    QuantizationScheme scheme{.layout = Layout::kFloat8, .scale_rows = QuantizationScheme::kWhole};
    if (config_.has("weight_block_size")) {
      std::tie(scheme.scale_rows, scheme.scale_columns) = read_block_size(config_, "weight_block_size");
    }
    add(scheme);
  }

  void read_awq() {
    read_choice(config_, {"version", "checkpoint_format", "format"}, "gemm", {"gemm"});
    read_choice(config_, {"backend"}, "autoawq", {"autoawq", "auto", "gptqmodel"});
    require_flag(config_, "zero_point", true, "weights with zero points");
    add({.layout = Layout::kAwq,
         .bits = read_bits(config_, config_.has("w_bit") ? "w_bit" : "bits", {4}),
         .scale_columns = read_group_size(config_, config_.has("q_group_size") ? "q_group_size" : "group_size"),
         .is_symmetric = false});
  }

  void read_gptq() {
    const std::string format = read_choice(config_, {"checkpoint_format", "format"}, "gptq", {"gptq", "gptq_v2"});
    read_choice(config_, {"pack_dtype"}, "int32", {"int32"});
    require_flag(config_, "is_marlin_format", false, "weights in the order of GPTQ");
    QuantizationScheme base{.layout = Layout::kGptq, .has_zeros_less_one = format == "gptq"};
    read_gptq_settings(config_, base, true);
    add(base);
    read_gptq_exceptions(base);
  }

  // Those of the whole model, or of the modules that a pattern names: then those that differ.
  static void read_gptq_settings(const JsonObject& object, QuantizationScheme& scheme, bool is_complete) {
    if (is_complete || object.has("bits")) scheme.bits = read_bits(object, "bits", {4, 8});
    if (is_complete || object.has("group_size")) scheme.scale_columns = read_group_size(object, "group_size");
    object.read("sym", scheme.is_symmetric);
    object.read("desc_act", scheme.has_column_order);
  }

  // "+:pattern" or "pattern": these modules have other settings; "-:pattern": they are plain, which the tensors say.
  void read_gptq_exceptions(const QuantizationScheme& base) {
    const std::optional<JsonObject> exceptions = config_.object("dynamic");
    if (!exceptions) return;
    for (const auto& [key, value] : exceptions->value().items()) {
      if (key.starts_with("-:")) continue;
      const std::optional<JsonObject> settings = exceptions->object(key);
      if (!settings) continue;
      QuantizationScheme scheme = base;
      read_gptq_settings(*settings, scheme, false);
      add_pattern(scheme, key.starts_with("+:") ? key.substr(2) : key, *exceptions, key);
    }
  }

  void read_compressed_tensors() {
    require_no_rotation(config_);
    const std::optional<JsonObject> groups = config_.object("config_groups");
    if (!groups || groups->value().empty()) throw config_.error("config_groups", "an object of at least one group");
    for (const auto& [name, value] : groups->value().items()) {
      const std::optional<JsonObject> group = groups->object(name);
      const std::optional<JsonObject> weights = group ? group->object("weights") : std::nullopt;
      if (!weights) continue;  // quantizes activations alone
      const JsonObject& formatted = group->has("format") ? *group : config_;
      add_targets(*group, read_weights(*weights, read_format(formatted)));
    }
    if (!result_.is_present()) throw config_.error("config_groups", "a group with weights", "none");
  }

  static std::string read_format(const JsonObject& object) {
    const std::vector<std::string> known = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized"};
    const std::string format = read_choice(object, {"format"}, "", known);
    if (format.empty()) throw object.error("format", one_of(known));
    return format;
  }

  static QuantizationScheme read_weights(const JsonObject& weights, const std::string& format) {
    const std::string type = read_choice(weights, {"type"}, "int", {"int", "float"});
    const bool is_packed = format == "pack-quantized";
    if (type != (format == "float-quantized" ? "float" : is_packed || format == "int-quantized" ? "int" : type)) {
      throw weights.error("type", type == "int" ? "'float' in format float-quantized" : "'int' in format " + format);
    }
    QuantizationScheme scheme;
    scheme.layout = is_packed ? Layout::kPackedRows : type == "int" ? Layout::kInt8 : Layout::kFloat8;
    scheme.bits = is_packed ? read_bits(weights, "num_bits", {4, 8}) : read_bits(weights, "num_bits", {8});
    weights.read("symmetric", scheme.is_symmetric);
    if (type == "float" && !scheme.is_symmetric) throw weights.error("symmetric", "true, as 8-bit floats are");
    read_strategy(weights, scheme);
    scheme.has_column_order = is_packed && has_column_order(weights);
    return scheme;
  }

  static void read_strategy(const JsonObject& weights, QuantizationScheme& scheme) {
    const bool is_float = scheme.layout == Layout::kFloat8;
    std::vector<std::string> known = {"channel", "group"};
    if (scheme.layout != Layout::kPackedRows) known.emplace_back("tensor");
    if (is_float) known.emplace_back("block");
    int64_t group_size = 0;
    if (weights.has("group_size")) group_size = read_group_size(weights, "group_size");
    const std::string guess = group_size > 0 ? "group" : group_size < 0 ? "channel" : "tensor";
    const std::string strategy = read_choice(weights, {"strategy"}, guess, known);
    if (std::ranges::count(known, strategy) == 0) throw weights.error("strategy", one_of(known));
    if (strategy == "group") scheme.scale_columns = read_group_size(weights, "group_size");
    if (strategy == "tensor") scheme.scale_rows = QuantizationScheme::kWhole;
    if (strategy == "block") {
      std::tie(scheme.scale_rows, scheme.scale_columns) = read_block_size(weights, "block_structure");
    }
  }

  // Columns may have been quantized in another order than they have, with the groups of that order or with their own.
  static bool has_column_order(const JsonObject& weights) {
    const json* order = weights.find("actorder");
    if (order == nullptr) return false;
    if (order->is_boolean()) return order->get<bool>();
    const std::string kind = read_choice(weights, {"actorder"}, "", {"dynamic", "group", "static", "weight"});
    return kind == "group" || kind == "dynamic";
  }

  void add_targets(const JsonObject& group, const QuantizationScheme& scheme) {
    constexpr std::string_view kExpected = "an array of names of modules or classes, or of patterns after re:";
    const json* targets = group.array("targets");
    if (targets == nullptr) throw group.error("targets", kExpected);
    for (const json& target : *targets) {
      if (!target.is_string()) throw group.error("targets", kExpected, describe(target));
      const auto& text = target.get_ref<const std::string&>();
      if (text.starts_with(kPatternPrefix)) {
        add_pattern(scheme, text.substr(kPatternPrefix.size()), group, "targets");
      } else if (text.find('.') != text.npos || text == "lm_head") {
        add_name(scheme, text);
      } else {
        add(scheme);
      }
    }
  }

  const JsonObject& config_;
  QuantizationConfig result_;
};

const QuantizationScheme& QuantizationConfig::scheme_of(const std::string& module) const {
  if (const auto it = names_.find(bare_name(module)); it != names_.end()) return it->second;
  const Rule* found = nullptr;
  for (const Rule& rule : patterns_) {
    if (!rule.matches(module)) continue;
    if (found != nullptr && found->scheme != rule.scheme) {
      throw checkpoint_error(file_, "quantization of " + quote(module), "one scheme",
                             "several that differ: " + quote(found->pattern) + ", " + quote(rule.pattern));
    }
    found = &rule;
  }
  if (found != nullptr) return found->scheme;
  if (others_) return *others_;
  throw checkpoint_error(file_, "quantization of " + quote(module), "a scheme for the module", "none");
}

QuantizationConfig read_quantization_config(const std::filesystem::path& dir) {
  const std::filesystem::path file = dir / "config.json";
  const json document = read_json_file(file);
  const JsonObject outer(document, file);
  std::vector<JsonObject> levels = {outer};
  if (const std::optional<JsonObject> text = outer.object("text_config")) levels.push_back(*text);
  for (const JsonObject& level : levels) {
    for (const char* key : {"quantization_config", "compression_config"}) {
      const std::optional<JsonObject> config = level.object(key);
      if (!config) continue;
      const bool is_compression = std::string_view(key) == "compression_config";
      return QuantizationConfigReader(*config, file).read(is_compression ? "compressed-tensors" : "");
    }
  }
  return {};
}

}  // namespace xgdn
