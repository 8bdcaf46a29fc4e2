// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/json_object.h"

#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

namespace xgdn {
namespace {

using nlohmann::json;

// config.json nests three deep, a safetensors header two; every level of hostile nesting costs heap.
constexpr int kMaxDepth = 32;
constexpr size_t kMaxQuoted = 120;

// Watches the parser's events: a document that repeats a key, or nests too deep, ends the parse.
class StructureCheck {
 public:
  explicit StructureCheck(const std::filesystem::path& file) : file_(file) {}

  void operator()(int depth, json::parse_event_t event, const json& parsed) {
    using Event = json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      open(depth, event == Event::object_start);
    } else if (event == Event::key) {
      add_key(keys_[static_cast<size_t>(depth) - 1], parsed.get_ref<const std::string&>());
    }
  }

 private:
  void open(int depth, bool is_object) {
    if (depth >= kMaxDepth) {
      throw checkpoint_error(file_, "", "JSON nested at most " + std::to_string(kMaxDepth) + " deep",
                             "a deeper document");
    }
    keys_.resize(static_cast<size_t>(depth) + 1);
    if (is_object) keys_.back().clear();
  }

  void add_key(std::set<std::string>& keys, const std::string& key) {
    if (!keys.insert(key).second) {
      throw checkpoint_error(file_, quote(key), "each key once per object", "a duplicate key");
    }
  }

  const std::filesystem::path& file_;
  std::vector<std::set<std::string>> keys_;  // of the open objects, outermost first
};

}  // namespace

CheckpointError checkpoint_error(const std::filesystem::path& file, std::string_view subject, std::string_view expected,
                                 std::string_view got) {
  std::string message = "[checkpoint] " + file.string() + ": ";
  if (!subject.empty()) message.append(subject).append(": ");
  message.append("expected ").append(expected).append(", got ").append(got);
  return CheckpointError(message);
}

std::string quote(std::string_view text) {
  std::string quoted = "'";
  for (const char c : text.substr(0, kMaxQuoted)) {
    quoted += c >= 0x20 && c < 0x7f ? c : '?';
  }
  if (text.size() > kMaxQuoted) quoted += "...";
  return quoted + "'";
}

std::string describe(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array of " + std::to_string(value.size());
  if (value.is_string()) return quote(value.get_ref<const std::string&>());
  return value.dump();
}

std::string describe_shape(std::span<const int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

json parse_json(std::string_view text, const std::filesystem::path& file) {
  StructureCheck check(file);
  const auto watch = [&check](int depth, json::parse_event_t event, json& parsed) {
    check(depth, event, parsed);
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::exception& e) {
    throw checkpoint_error(file, "", "valid JSON", quote(e.what()));
  }
}

json read_json_file(const std::filesystem::path& file) {
  std::error_code code;
  const auto size = std::filesystem::file_size(file, code);  // an error for whatever is no regular file
  if (code) throw checkpoint_error(file, "", "a readable file", quote(code.message()));
  if (size > static_cast<uintmax_t>(kMaxJsonBytes)) {
    throw checkpoint_error(file, "", "JSON of at most 100 MB", std::to_string(size) + " bytes");
  }
  std::string text(size, '\0');
  std::ifstream stream(file, std::ios::binary);
  if (!stream.read(text.data(), static_cast<std::streamsize>(size))) {
    throw checkpoint_error(file, "", "a readable file", "a read error");
  }
  return parse_json(text, file);
}

std::optional<int64_t> integer_within(const json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return std::nullopt;
  constexpr auto kMax = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (value.is_number_unsigned() && value.get<uint64_t>() > kMax) return std::nullopt;
  const auto number = value.get<int64_t>();
  if (number < min || number > max) return std::nullopt;
  return number;
}

JsonObject::JsonObject(const json& value, const std::filesystem::path& file, std::string prefix)
    : value_(&value), file_(&file), prefix_(std::move(prefix)) {
  if (!value.is_object()) {
    const std::string subject = prefix_.empty() ? "" : prefix_.substr(0, prefix_.size() - 1);
    throw checkpoint_error(file, subject, "an object", describe(value));
  }
}

const json* JsonObject::find(const std::string& key) const {
  const auto it = value_->find(key);
  return it == value_->end() || it->is_null() ? nullptr : &*it;
}

std::optional<JsonObject> JsonObject::object(const std::string& key) const {
  const json* found = find(key);
  if (found == nullptr) return std::nullopt;
  return JsonObject(*found, *file_, prefix_ + key + ".");
}

void JsonObject::read(const std::string& key, int64_t& value, int64_t min, int64_t max) const {
  const json* found = find(key);
  if (found == nullptr) return;
  const std::optional<int64_t> number = integer_within(*found, min, max);
  if (!number) throw error(key, "an integer from " + std::to_string(min) + " to " + std::to_string(max));
  value = *number;
}

void JsonObject::read(const std::string& key, double& value) const {
  const json* found = find(key);
  if (found == nullptr) return;
  if (!found->is_number() || !std::isfinite(found->get<double>())) throw error(key, "a finite number");
  value = found->get<double>();
}

void JsonObject::read(const std::string& key, bool& value) const {
  const json* found = find(key);
  if (found == nullptr) return;
  if (!found->is_boolean()) throw error(key, "true or false");
  value = found->get<bool>();
}

void JsonObject::read(const std::string& key, std::string& value) const {
  const json* found = find(key);
  if (found == nullptr) return;
  if (!found->is_string()) throw error(key, "a string");
  value = found->get_ref<const std::string&>();
}

const json* JsonObject::array(const std::string& key) const {
  const json* found = find(key);
  if (found != nullptr && !found->is_array()) throw error(key, "an array");
  return found;
}

CheckpointError JsonObject::error(const std::string& key, std::string_view expected, std::string_view got) const {
  return checkpoint_error(*file_, prefix_ + key, expected, got);
}

CheckpointError JsonObject::error(const std::string& key, std::string_view expected) const {
  const json* found = find(key);
  return error(key, expected, found == nullptr ? "nothing" : describe(*found));
}

}  // namespace xgdn
