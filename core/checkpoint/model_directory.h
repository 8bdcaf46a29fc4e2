// SPDX-License-Identifier: Apache-2.0
// A Hugging Face directory, opened: the config and the weights' headers, checked against each other.
#pragma once

#include <filesystem>

#include "core/checkpoint/checkpoint.h"
#include "core/models/model_config.h"

namespace xgdn {

/// What a model is built from. Of the weights only the headers have been read.
struct ModelDirectory {
  /// Throws CheckpointError for whatever is missing, damaged or beyond what the decoder computes.
  explicit ModelDirectory(const std::filesystem::path& dir);

  ModelConfig config;  // with a dtype: the checkpoint's prevailing one where the files name none
  Checkpoint checkpoint;
};

}  // namespace xgdn
