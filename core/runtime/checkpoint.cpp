// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/checkpoint.h"

#include <c10/core/ScalarType.h>

#include <optional>
#include <set>
#include <string_view>
#include <system_error>

#include "core/runtime/json_object.h"

namespace xgdn {
namespace {

using nlohmann::json;

constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

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

}  // namespace

Checkpoint::Checkpoint(const std::filesystem::path& dir) : dir_(dir) {
  std::error_code unreadable;
  if (std::filesystem::exists(dir / kSingleFile, unreadable)) {
    add_shard(dir / kSingleFile);
  } else if (std::filesystem::exists(dir / kIndexFile, unreadable)) {
    add_indexed_shards(dir / kIndexFile);
  } else {
    throw checkpoint_error(dir, "", std::string(kSingleFile) + " or " + std::string(kIndexFile), "a directory without");
  }
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
    if (contains(name) && shard(name).path().filename() == file) continue;
    throw checkpoint_error(dir_ / file, "tensor " + quote(name), "a tensor of that name, as the index says",
                           "a file without");
  }
}

const SafetensorsFile& Checkpoint::shard(const std::string& name) const {
  const auto it = shard_of_.find(name);
  if (it == shard_of_.end()) throw checkpoint_error(dir_, "tensor " + quote(name), "a tensor of that name", "none");
  return shards_[it->second];
}

const SafetensorsFile::Entry& Checkpoint::entry(const std::string& name, at::IntArrayRef shape) const {
  const SafetensorsFile& file = shard(name);
  const SafetensorsFile::Entry& entry = file.entry(name);
  if (at::IntArrayRef(entry.shape) != shape) {
    throw checkpoint_error(file.path(), "tensor " + quote(name), describe_shape(shape), describe_shape(entry.shape));
  }
  if (!c10::isFloatingType(entry.dtype)) {
    throw checkpoint_error(file.path(), "tensor " + quote(name), "a floating-point dtype", c10::toString(entry.dtype));
  }
  return entry;
}

at::Tensor Checkpoint::get(const std::string& name, at::IntArrayRef shape) const {
  entry(name, shape);
  return shard(name).tensor(name);
}

void Checkpoint::release(const std::string& name) const {
  shard(name).release(name);
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, position] : shard_of_) names.push_back(name);
  return names;
}

}  // namespace xgdn
