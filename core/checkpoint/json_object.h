// SPDX-License-Identifier: Apache-2.0
// The JSON of a checkpoint directory, which may be damaged or hostile: parsing with limits, typed reads, and the one
// wording of CheckpointError. Internal to core/checkpoint; public headers do not include it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "core/errors.h"

namespace xgdn {

/// JSON text longer than this is refused; also the safetensors format's own limit of its header.
inline constexpr int64_t kMaxJsonBytes = 100'000'000;

/// "[checkpoint] FILE: SUBJECT: expected EXPECTED, got GOT"; the subject is a key or a tensor's name, or empty.
CheckpointError checkpoint_error(const std::filesystem::path& file, std::string_view subject, std::string_view expected,
                                 std::string_view got);

/// A short form of text from a file, in printable ASCII whatever the text holds.
std::string quote(std::string_view text);

/// What a value is, in at most a few words; never recurses.
std::string describe(const nlohmann::json& value);

/// "[2, 3]"
std::string describe_shape(std::span<const int64_t> sizes);

/// Parses one JSON document. Refuses duplicate keys, which parsers read differently, and deep nesting.
nlohmann::json parse_json(std::string_view text, const std::filesystem::path& file);

/// Reads and parses a whole file.
nlohmann::json read_json_file(const std::filesystem::path& file);

/// A view of a JSON object, with the file and the keys that lead to it. A key whose value is null counts as absent, as
/// transformers writes it. The reads leave `value` alone when the key is absent, and throw CheckpointError when what
/// is there has another type or lies outside [min, max].
class JsonObject {
 public:
  /// Throws CheckpointError unless `value` is an object. Both references must outlive the view.
  JsonObject(const nlohmann::json& value, const std::filesystem::path& file, std::string prefix = "");

  bool has(const std::string& key) const { return find(key) != nullptr; }
  const nlohmann::json* find(const std::string& key) const;
  std::optional<JsonObject> object(const std::string& key) const;

  void read(const std::string& key, int64_t& value, int64_t min, int64_t max) const;
  void read(const std::string& key, double& value) const;
  void read(const std::string& key, bool& value) const;
  void read(const std::string& key, std::string& value) const;

  /// The array under `key`, or nullptr.
  const nlohmann::json* array(const std::string& key) const;

  /// The error to throw about `key`.
  CheckpointError error(const std::string& key, std::string_view expected, std::string_view got) const;
  CheckpointError error(const std::string& key, std::string_view expected) const;

  const nlohmann::json& value() const { return *value_; }

 private:
  const nlohmann::json* value_;
  const std::filesystem::path* file_;
  std::string prefix_;  // "" or "text_config."
};

/// The integer in `value`, if it is one within [min, max].
std::optional<int64_t> integer_within(const nlohmann::json& value, int64_t min, int64_t max);

}  // namespace xgdn
