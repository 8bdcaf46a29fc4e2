// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/model_directory.h"

#include "core/checkpoint/model_config_json.h"

namespace xgdn {

ModelDirectory::ModelDirectory(const std::filesystem::path& dir)
    : config(read_model_config(dir)), checkpoint(dir, read_quantization_config(dir)) {
  if (!config.dtype) config.dtype = checkpoint.prevailing_dtype();
}

}  // namespace xgdn
