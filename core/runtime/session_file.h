// SPDX-License-Identifier: Apache-2.0
// Sessions on disk: tokens, and the state after some of them with their keys and values, as a safetensors file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "core/layers/gdn_state.h"
#include "core/runtime/sequence_memory.h"

namespace xgdn {

/// What a file holds.
struct SavedSession {
  std::vector<int32_t> tokens;
  int64_t num_kept = 0;  // of these, the first that the state is of
  SavedMemory memory;    // after them; empty where there are none
};

/// What an engine can take.
struct SessionSpecs {
  uint64_t model_digest = 0;
  int64_t vocab_size = 0;
  int64_t least_kept = 1;                      // tokens that a state is of, where there is one
  std::vector<std::vector<StateSpec>> states;  // of each GDN layer
  int64_t num_attention_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t kv_row_size = 0;
  at::ScalarType kv_dtype = at::kFloat;
};

/// Writes the file in one piece, with a digest of every head of every tensor: nobody ever finds half of it. Throws
/// CheckpointError when it cannot be written.
void write_session(const std::filesystem::path& path, const SavedSession& session, const SessionSpecs& specs);

/// Throws CheckpointError for a file that is damaged, of another version or of another model, and where its states or
/// keys and values have other shapes or dtypes than the specs, are of another kind, or of fewer tokens; the sentence
/// names file, tensor, expected and found.
SavedSession read_session(const std::filesystem::path& path, const SessionSpecs& specs);

}  // namespace xgdn
