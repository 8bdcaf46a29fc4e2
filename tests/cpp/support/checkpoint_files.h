// SPDX-License-Identifier: Apache-2.0
// Checkpoint files written by hand, and the check that reading one is refused with the right words.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "core/errors.h"

namespace xgdn::testing {

/// A directory of its own, removed with what it holds.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (std::filesystem::temp_directory_path() / "xgdn-test-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed for " + name);
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }

  const std::filesystem::path& path() const { return path_; }

  std::filesystem::path write(const std::string& name, std::string_view content) const {
    const std::filesystem::path file = path_ / name;
    std::ofstream stream(file, std::ios::binary | std::ios::trunc);
    stream.write(content.data(), static_cast<std::streamsize>(content.size()));
    return file;
  }

 private:
  std::filesystem::path path_;
};

/// The bytes of a safetensors file: the header's length, unless given as it is, the header, the data.
inline std::string safetensors_bytes(std::string_view header, std::string_view data, int64_t length = -1) {
  const uint64_t stated = length < 0 ? header.size() : static_cast<uint64_t>(length);
  std::string bytes;
  for (int shift = 0; shift < 64; shift += 8) bytes += static_cast<char>(stated >> shift & 0xff);
  return bytes.append(header).append(data);
}

/// Runs `read` and expects a CheckpointError whose message holds every word.
inline void expect_refused(const std::function<void()>& read, std::initializer_list<std::string_view> words) {
  try {
    read();
  } catch (const CheckpointError& e) {
    const std::string_view message = e.what();
    for (const std::string_view word : words) {
      EXPECT_NE(message.find(word), message.npos) << "no \"" << word << "\" in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "nothing was thrown; expected a message with " << *words.begin();
}

}  // namespace xgdn::testing
