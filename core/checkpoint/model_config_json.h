// SPDX-License-Identifier: Apache-2.0
// Reads a decoder's configuration from a Hugging Face directory.
#pragma once

#include <filesystem>

#include "core/models/model_config.h"

namespace xgdn {

/// Parses config.json, and the token ids of generation_config.json where it names them; the tokens that end a sequence
/// are those of both files and of both levels of a wrapper's config. Knows qwen3_5_text and qwen3_5_moe_text, the text
/// part of their vision-language wrappers qwen3_5 and qwen3_5_moe, and qwen3_next; dtype is empty where the file leaves
/// it to the weights; other keys that are absent take transformers' defaults. Throws CheckpointError naming the file
/// and the key for whatever is malformed, inconsistent, or beyond what the decoder computes (other rotary scalings or
/// activations). What the file says of quantized weights is for read_quantization_config.
ModelConfig read_model_config(const std::filesystem::path& dir);

}  // namespace xgdn
