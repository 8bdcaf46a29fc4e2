// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face directory: one safetensors file, or several with an index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "core/layers/weight_source.h"
#include "core/runtime/safetensors.h"

namespace xgdn {

/// Opens model.safetensors, or else the shards that model.safetensors.index.json names. Nothing is read but the headers
/// until a tensor's elements are.
class Checkpoint : public WeightSource {
 public:
  /// Throws CheckpointError when files are missing or damaged, when the index leaves the directory or names a tensor
  /// that its shard does not hold, or when two shards hold the same tensor.
  explicit Checkpoint(const std::filesystem::path& dir);

  /// Whether a shard holds the tensor.
  bool contains(const std::string& name) const override { return shard_of_.contains(name); }

  /// Dtype and place of a tensor of that shape. Throws CheckpointError when the name is missing, the shape differs or
  /// the tensor is not of floating point.
  const SafetensorsFile::Entry& entry(const std::string& name, at::IntArrayRef shape) const;

  /// Read-only, as SafetensorsFile::tensor. Throws as entry().
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override;

  bool is_mapped() const override { return true; }

  void release(const std::string& name) const override;

  /// All tensors, in alphabetical order.
  std::vector<std::string> names() const;

  /// Bytes of all tensors together.
  int64_t total_bytes() const { return total_bytes_; }

 private:
  void add_shard(const std::filesystem::path& path);
  void add_indexed_shards(const std::filesystem::path& index);
  const SafetensorsFile& shard(const std::string& name) const;

  std::filesystem::path dir_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, size_t> shard_of_;  // position in shards_
  int64_t total_bytes_ = 0;
};

}  // namespace xgdn
