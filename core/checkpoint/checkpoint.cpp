// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/checkpoint.h"

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <functional>
#include <optional>
#include <system_error>

#include "core/checkpoint/json_object.h"

namespace xgdn {
namespace {

using nlohmann::json;

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

constexpr std::array<std::string_view, 2> kWrappers = {"model.", "language_model."};
constexpr std::array<std::string_view, 6> kOtherParts = {"mtp.",          "visual.",      "vision_tower.",
                                                         "vision_model.", "audio_tower.", "multi_modal_projector."};
// Words between dots and underscores, such as in weight_scale_inv, qzeros, g_idx, weight.quant_state.bitsandbytes__nf4.
constexpr std::array<std::string_view, 14> kQuantizerStems = {"scale",   "scaling",  "scb",    "absmax", "amax",
                                                              "qweight", "qzero",    "qscale", "zero",   "pack",
                                                              "quant",   "codebook", "codes",  "nested"};
constexpr std::array<std::string_view, 5> kQuantizerWords = {"idx", "blocks", "perm", "shape", "format"};
constexpr std::array<std::string_view, 3> kGateProjections = {".in_proj_a.weight", ".in_proj_b.weight",
                                                              ".in_proj_ba.weight"};
constexpr size_t kMostSuggestions = 3;

// A file of the checkpoint's own directory and nothing else; a backslash or a NUL would end or split the name
// elsewhere.
bool is_plain_file_name(std::string_view name) {
  using namespace std::string_view_literals;
  return name.ends_with(".safetensors") && name.find_first_of("/\\\0"sv) == name.npos && name.find("..") == name.npos;
}

// Tensor name -> shard's file name, checked to stay within the directory.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& index) {
  const json document = read_json_file(index);
  const JsonObject root(document, index);
  const std::optional<JsonObject> weights = root.object("weight_map");
  if (!weights) throw root.error("weight_map", "an object");
  std::map<std::string, std::string> files;
  for (const auto& [name, file] : weights->value().items()) {
    if (!file.is_string() || !is_plain_file_name(file.get_ref<const std::string&>())) {
      throw checkpoint_error(index, "tensor " + quote(name), "a plain file name that ends in .safetensors",
                             describe(file));
    }
    files.emplace(name, file.get<std::string>());
  }
  return files;
}

std::string_view module_of(std::string_view name) {
  const size_t dot = name.rfind('.');
  return dot == name.npos ? std::string_view() : name.substr(0, dot);
}

std::string_view leaf_of(std::string_view name) {
  return name.substr(name.rfind('.') + 1);  // all of it where there is no dot
}

bool is_weight_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat || dtype == at::kDouble;
}

std::string quoted_list(const std::vector<std::string>& names) {
  std::vector<std::string> quoted;
  for (const std::string& name : names) quoted.push_back(quote(name));
  return c10::Join(", ", quoted);
}

}  // namespace

std::string_view bare_name(std::string_view name) {
  for (size_t i = 0; i < kWrappers.size();) {
    const bool is_wrapped = name.starts_with(kWrappers[i]);
    if (is_wrapped) name.remove_prefix(kWrappers[i].size());
    i = is_wrapped ? 0 : i + 1;
  }
  return name;
}

bool is_other_part(std::string_view bare) {
  return std::ranges::any_of(kOtherParts, [&](std::string_view part) { return bare.starts_with(part); }) ||
         bare.ends_with("rotary_emb.inv_freq");
}

bool is_quantizer_part(std::string_view name) {
  for (size_t begin = 0; begin < name.size();) {
    const size_t end = std::min(name.find_first_of("._", begin), name.size());
    std::string word(name.substr(begin, end - begin));
    std::ranges::transform(word, word.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (word.starts_with("lora")) return false;  // an adapter's own scaling
    if (std::ranges::any_of(kQuantizerStems, [&](std::string_view stem) { return word.starts_with(stem); }) ||
        std::ranges::count(kQuantizerWords, word) > 0) {
      return true;
    }
    begin = end + 1;
  }
  return false;
}

bool is_gate_projection(std::string_view name) {
  return std::ranges::any_of(kGateProjections, [&](std::string_view end) { return name.ends_with(end); });
}

Checkpoint::Checkpoint(const std::filesystem::path& dir, QuantizationConfig quantization)
    : dir_(dir), quantization_(std::move(quantization)) {
  std::error_code unreadable;
  if (std::filesystem::exists(dir / kSingleFile, unreadable)) {
    add_shard(dir / kSingleFile);
  } else if (std::filesystem::exists(dir / kIndexFile, unreadable)) {
    add_indexed_shards(dir / kIndexFile);
  } else {
    throw checkpoint_error(dir, "", std::string(kSingleFile) + " or " + std::string(kIndexFile), "a directory without");
  }
  index_bare_names();
}

void Checkpoint::add_shard(const std::filesystem::path& path) {
  const SafetensorsFile& added = shards_.emplace_back(path);
  for (const auto& [name, entry] : added.entries()) {
    const auto [other, is_new] = shard_of_.emplace(name, shards_.size() - 1);
    if (!is_new) {
      throw checkpoint_error(path, "tensor " + quote(name), "a tensor that no other shard holds",
                             "a second one beside " + shards_[other->second].path().filename().string());
    }
    total_bytes_ += entry.num_bytes();
  }
}

void Checkpoint::add_indexed_shards(const std::filesystem::path& index) {
  const std::map<std::string, std::string> files = read_weight_map(index);
  std::set<std::string> distinct;
  for (const auto& [name, file] : files) distinct.insert(file);
  for (const std::string& file : distinct) add_shard(dir_ / file);
  for (const auto& [name, file] : files) {
    if (shard_of_.contains(name) && shard(name).path().filename() == file) continue;
    throw checkpoint_error(dir_ / file, "tensor " + quote(name), "a tensor of that name, as the index says",
                           "a file without");
  }
}

void Checkpoint::index_bare_names() {
  for (const auto& [name, position] : shard_of_) stored_[std::string(bare_name(name))].push_back(name);
}

const std::string& Checkpoint::stored_name(const std::string& name) const {
  const auto it = stored_.find(bare_name(name));
  if (it == stored_.end()) throw missing(name);
  const std::vector<std::string>& names = it->second;
  for (const std::string& other : names) {
    if (have_same_bytes(names.front(), other)) continue;
    throw checkpoint_error(dir_, "tensor " + quote(name), "one tensor of that name, or equal ones",
                           "different ones: " + quoted_list(names));
  }
  return names.front();
}

// Names what may be meant: the tensor under a prefix that nobody knows, or the parts that a quantizer put in its place.
CheckpointError Checkpoint::missing(const std::string& name) const {
  const std::string bare(bare_name(name));
  std::string leaf = bare;
  if (const size_t dot = bare.rfind('.'); dot != bare.npos) leaf.insert(dot, ".base_layer");
  const std::string module(module_of(bare));
  std::vector<std::string> similar;
  std::vector<std::string> quantized;
  for (const auto& [other, stored] : stored_) {
    const bool is_wrapped = other == leaf || other.ends_with("." + bare) || other.ends_with("." + leaf);
    if (is_wrapped && !is_other_part(other)) similar.push_back(stored.front());
    const bool is_beside = !module.empty() && other.starts_with(module + ".");
    if (is_beside && is_quantizer_part(std::string_view(other).substr(module.size() + 1))) {
      quantized.push_back(stored.front());
    }
  }
  std::string got = "none";
  if (!similar.empty()) {
    similar.resize(std::min(similar.size(), kMostSuggestions));
    got += ", but " + quoted_list(similar);
  } else if (!quantized.empty()) {
    got += ", but " + quoted_list(quantized);
    got += quantization_.is_present() ? ": this weight cannot be quantized"
                                      : ", and config.json has no quantization_config";
  }
  return checkpoint_error(dir_, "tensor " + quote(name), "a tensor of that name", got);
}

const SafetensorsFile::Entry& Checkpoint::entry(const std::string& name, at::IntArrayRef shape) const {
  const std::string& stored = stored_name(name);
  const SafetensorsFile& file = shard(stored);
  const SafetensorsFile::Entry& entry = file.entry(stored);
  if (!is_weight_dtype(entry.dtype)) {
    throw checkpoint_error(file.path(), "tensor " + quote(stored), "dtype BF16, F16, F32 or F64", entry.dtype_name);
  }
  if (at::IntArrayRef(entry.shape) != shape) {
    throw checkpoint_error(file.path(), "tensor " + quote(stored), describe_shape(shape), describe_shape(entry.shape));
  }
  return entry;
}

// Whether parts of a weight tell that it is quantized: tensors that a plain one has not, or its own dtype.
bool Checkpoint::is_quantized(const std::string& name) const {
  if (!quantization_.is_present()) return false;
  const std::vector<std::string> parts = quantized_part_names(name);
  if (std::ranges::any_of(parts, [&](const std::string& part) { return is_stored(part); })) return true;
  if (!is_stored(name)) return false;
  const std::string& stored = stored_name(name);
  return !is_weight_dtype(shard(stored).entry(stored).dtype);
}

std::optional<StoredWeight> Checkpoint::find_quantized(const std::string& name, at::IntArrayRef shape) const {
  if (shape.size() < 2 || !is_quantized(name)) return std::nullopt;
  const auto find = [this](const std::string& part) -> std::optional<StoredTensor> {
    if (!is_stored(part)) return std::nullopt;
    const std::string& stored = stored_name(part);
    return StoredTensor{&shard(stored), stored};
  };
  const std::string module(name.ends_with(".weight") ? module_of(name) : name);
  return StoredWeight(quantization_.scheme_of(module), dir_, name, shape, find);
}

std::optional<kernel::QuantizedRows> Checkpoint::quantized(const std::string& name, at::IntArrayRef shape) const {
  if (is_gate_projection(name)) return std::nullopt;
  const std::optional<StoredWeight> weight = find_quantized(name, shape);
  if (!weight) return std::nullopt;
  return weight->read();
}

at::Tensor Checkpoint::get(const std::string& name, at::IntArrayRef shape) const {
  if (is_gate_projection(name)) {
    if (const std::optional<StoredWeight> weight = find_quantized(name, shape)) {
      return kernel::dequantize(kernel::pack_rows(weight->read()), shape.front());
    }
  }
  entry(name, shape);
  const std::string& stored = stored_name(name);
  return shard(stored).tensor(stored);
}

bool Checkpoint::have_same_bytes(const std::string& stored, const std::string& other) const {
  if (stored == other) return true;
  const SafetensorsFile::Entry& a = shard(stored).entry(stored);
  const SafetensorsFile::Entry& b = shard(other).entry(other);
  if (a.dtype_name != b.dtype_name || a.shape != b.shape) return false;
  const bool is_same = shard(stored).bytes(stored) == shard(other).bytes(other);
  shard(stored).release(stored);
  shard(other).release(other);
  return is_same;
}

bool Checkpoint::is_same(const std::string& name, const std::string& other) const {
  return is_stored(name) && is_stored(other) && have_same_bytes(stored_name(name), stored_name(other));
}

void Checkpoint::release(const std::string& name) const {
  const auto release_stored = [this](const std::string& stored) { shard(stored).release(stored); };
  const bool has_parts = is_quantized(name);
  if (!has_parts || is_stored(name)) release_stored(stored_name(name));
  if (!has_parts) return;
  for (const std::string& part : quantized_part_names(name)) {
    if (is_stored(part)) release_stored(stored_name(part));
  }
}

at::ScalarType Checkpoint::prevailing_dtype() const {
  std::map<at::ScalarType, int64_t> elements;
  for (const auto& [bare, names] : stored_) {
    const SafetensorsFile::Entry& entry = shard(names.front()).entry(names.front());
    if (is_other_part(bare) || is_quantizer_part(leaf_of(bare)) || !is_weight_dtype(entry.dtype)) continue;
    elements[entry.dtype] += entry.num_bytes() / static_cast<int64_t>(c10::elementSize(entry.dtype));
  }
  if (elements.empty()) return at::kFloat;
  return std::ranges::max_element(elements, {}, [](const auto& count) { return count.second; })->first;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, position] : shard_of_) names.push_back(name);
  return names;
}

at::Tensor CheckpointShapes::get(const std::string& name, at::IntArrayRef shape) const {
  const auto on_meta = [&](at::ScalarType dtype) {
    return at::empty(shape, at::TensorOptions().dtype(dtype).device(c10::kMeta));
  };
  if (is_gate_projection(name)) {
    if (const std::optional<StoredWeight> weight = checkpoint_.find_quantized(name, shape)) {
      ask(*weight);
      return on_meta(at::kFloat);
    }
  }
  const at::ScalarType dtype = checkpoint_.entry(name, shape).dtype;
  asked_.insert(checkpoint_.stored_name(name));
  return on_meta(dtype);
}

std::optional<kernel::QuantizedRows> CheckpointShapes::quantized(const std::string& name, at::IntArrayRef shape) const {
  if (is_gate_projection(name)) return std::nullopt;
  const std::optional<StoredWeight> weight = checkpoint_.find_quantized(name, shape);
  if (!weight) return std::nullopt;
  ask(*weight);
  return weight->shapes();
}

void CheckpointShapes::ask(const StoredWeight& weight) const {
  for (const StoredTensor& part : weight.parts()) asked_.insert(part.name);
}

bool CheckpointShapes::is_same(const std::string& name, const std::string& other) const {
  const bool is_same = checkpoint_.is_same(name, other);
  if (is_same) asked_.insert({checkpoint_.stored_name(name), checkpoint_.stored_name(other)});
  return is_same;
}

}  // namespace xgdn
