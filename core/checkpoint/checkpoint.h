// SPDX-License-Identifier: Apache-2.0
// The weights of a Hugging Face directory: one safetensors file, or several with an index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/checkpoint/quantization_config.h"
#include "core/checkpoint/safetensors.h"
#include "core/checkpoint/stored_weight.h"
#include "core/layers/weight_source.h"

namespace xgdn {

/// A tensor's name within the decoder: without the modules that models wrap around it, "model." and "language_model.",
/// in any order and number. Tensors under such prefixes are those of the decoder, whichever class saved them.
std::string_view bare_name(std::string_view name);

/// Whether a bare name is of a part that a text decoder leaves alone by design: draft heads, vision, rotary tables.
bool is_other_part(std::string_view bare);

/// Whether a name, relative to a module, is one that quantizers give to scales, packed weights and their tables.
bool is_quantizer_part(std::string_view name);

/// Whether a name is of the weight of a projection to the gates of linear attention: it is few rows, whose errors
/// decide what a state keeps, and stays plain.
bool is_gate_projection(std::string_view name);

/// Opens model.safetensors, or else the shards that model.safetensors.index.json names. Nothing is read but the headers
/// until a tensor's elements are. A tensor is found by its bare name, whatever prefixes the file and the caller use.
class Checkpoint : public WeightSource {
 public:
  /// Throws CheckpointError when files are missing or damaged, when the index leaves the directory or names a tensor
  /// that its shard does not hold, or when two shards hold the same tensor.
  explicit Checkpoint(const std::filesystem::path& dir, QuantizationConfig quantization = {});

  /// Whether config.json speaks of weights in 8 or 4 bits.
  bool has_quantization_config() const { return quantization_.is_present(); }

  /// Whether a shard holds the tensor, or parts of it.
  bool contains(const std::string& name) const override { return is_stored(name) || is_quantized(name); }

  /// The name under which the tensor is stored. Throws CheckpointError when there is none, saying what similar names
  /// there are, or when several prefixes lead to tensors that differ.
  const std::string& stored_name(const std::string& name) const;

  /// Dtype and place of a tensor of that shape. Throws CheckpointError when the name is missing, the shape differs or
  /// the dtype is not one that weights can be converted from: BF16, F16, F32, F64.
  const SafetensorsFile::Entry& entry(const std::string& name, at::IntArrayRef shape) const;

  /// Read-only, as SafetensorsFile::tensor; the projections of gates, where they are quantized, in float32. Throws as
  /// entry().
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override;

  /// The weight's parts, by their headers; nullopt: it is plain, or the config speaks of no quantized weights. Throws
  /// as StoredWeight.
  std::optional<StoredWeight> find_quantized(const std::string& name, at::IntArrayRef shape) const;

  /// As StoredWeight::read; nullopt for the projections of gates, too.
  std::optional<kernel::QuantizedRows> quantized(const std::string& name, at::IntArrayRef shape) const override;

  /// Compares the bytes of both tensors; quantized ones differ.
  bool is_same(const std::string& name, const std::string& other) const override;

  bool is_mapped() const override { return true; }

  void release(const std::string& name) const override;

  /// The dtype that most elements of the decoder's plain tensors have; F32 where none is of floating point.
  at::ScalarType prevailing_dtype() const;

  /// All tensors as stored, in alphabetical order.
  std::vector<std::string> names() const;

  const std::filesystem::path& directory() const { return dir_; }  // as opened

  /// Bytes of all tensors together.
  int64_t total_bytes() const { return total_bytes_; }

 private:
  bool is_stored(const std::string& name) const { return stored_.contains(bare_name(name)); }
  bool is_quantized(const std::string& name) const;
  void add_shard(const std::filesystem::path& path);
  void add_indexed_shards(const std::filesystem::path& index);
  void index_bare_names();
  const SafetensorsFile& shard(const std::string& stored) const { return shards_[shard_of_.at(stored)]; }
  bool have_same_bytes(const std::string& stored, const std::string& other) const;
  CheckpointError missing(const std::string& name) const;

  std::filesystem::path dir_;
  QuantizationConfig quantization_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, size_t> shard_of_;                               // position in shards_
  std::map<std::string, std::vector<std::string>, std::less<>> stored_;  // bare name -> names in the files
  int64_t total_bytes_ = 0;
};

/// A checkpoint's tensors without their elements, for a decoder that is built to be measured. Keeps what it asks for.
class CheckpointShapes : public WeightSource {
 public:
  /// `checkpoint` must outlive the object.
  explicit CheckpointShapes(const Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  bool contains(const std::string& name) const override { return checkpoint_.contains(name); }
  /// On the meta device. Throws as Checkpoint::get.
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override;
  /// On the meta device. Throws as Checkpoint::find_quantized.
  std::optional<kernel::QuantizedRows> quantized(const std::string& name, at::IntArrayRef shape) const override;
  bool is_same(const std::string& name, const std::string& other) const override;

  /// The tensors asked for so far, as stored.
  const std::set<std::string>& asked() const { return asked_; }

 private:
  void ask(const StoredWeight& weight) const;

  const Checkpoint& checkpoint_;
  mutable std::set<std::string> asked_;
};

}  // namespace xgdn
