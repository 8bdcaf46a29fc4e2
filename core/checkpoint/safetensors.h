// SPDX-License-Identifier: Apache-2.0
// One safetensors file, memory-mapped: 8 bytes of header length, a JSON header, the tensors' bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/errors.h"

namespace xgdn {

class MappedFile;

/// The header is checked in full when the file is opened, so that no later call can reach outside the mapping. The file
/// must not be truncated while it is mapped.
class SafetensorsFile {
 public:
  /// Where a tensor lies and what it is.
  struct Entry {
    at::ScalarType dtype = at::kFloat;    // Undefined where ATen has no such element, as in F4
    std::string_view dtype_name = "F32";  // in the file's words
    std::vector<int64_t> shape;
    int64_t begin = 0;  // byte range, from the file's first byte
    int64_t end = 0;

    int64_t num_bytes() const { return end - begin; }  // of the tensor
  };

  /// Throws CheckpointError naming the file, and the tensor where there is one, for whatever is damaged or lies.
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// The entry __metadata__ of the header; values that are no text are left out.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  const std::filesystem::path& path() const { return path_; }                       // as opened
  const std::map<std::string, Entry>& entries() const { return entries_; }          // by name
  bool contains(const std::string& name) const { return entries_.contains(name); }  // whether there is such a tensor

  /// Dtype, shape and place of a tensor; throws CheckpointError when the name is missing.
  const Entry& entry(const std::string& name) const;

  /// A view of the mapping, which it keeps alive; a copy only where the bytes are not aligned to the element. Tensors
  /// are read-only: the pages are mapped without write permission, so a write ends the process.
  at::Tensor tensor(const std::string& name) const;

  /// The elements as they lie in the file, for as long as a tensor or this object keeps the mapping.
  std::string_view bytes(const std::string& name) const;

  /// Drops the whole pages within the tensor from memory; a later read fetches them again from the file.
  void release(const std::string& name) const;

 private:
  std::filesystem::path path_;
  std::shared_ptr<const MappedFile> mapping_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes tensors of the host, in the order of their names, and the metadata. The file is written under another name
/// beside `path` and takes its place when it is whole. Throws CheckpointError when it cannot be written, and for a
/// dtype that the format does not have.
void write_safetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace xgdn
