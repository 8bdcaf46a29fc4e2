// SPDX-License-Identifier: Apache-2.0
// What a decoder would leave unused of its checkpoint, known before a weight is read.
#pragma once

#include <string>
#include <vector>

#include "core/checkpoint/model_directory.h"
#include "core/models/hybrid_decoder.h"

namespace xgdn {

/// What a user should know about a load that succeeded.
struct LoadReport {
  /// Tensors that the model does not have, as stored and in alphabetical order: biases, adapters, further layers. Not
  /// in: an MTP head (mtp.*) that is left alone, vision, and rotary tables, which no text decoder reads.
  std::vector<std::string> unused_tensors;
  /// The config ties the head to the token embedding, and the file holds another head, which is used.
  bool uses_own_head = false;
  /// The checkpoint has an MTP head, which the options leave alone.
  bool leaves_mtp_head = false;

  /// Lines for an operator, unused tensors shortened to a few; empty when there is nothing to say.
  std::vector<std::string> warnings() const;
};

/// Whether the checkpoint has tensors of a multi-token prediction head.
bool has_mtp_head(const Checkpoint& checkpoint);

/// Asks the checkpoint for every tensor of the decoder, reads headers only, and throws as loading would. Throws
/// CheckpointError, too, for tensors of a quantizer beside weights that are used: without them the weights are others.
LoadReport inspect(const ModelDirectory& opened, DecoderOptions options);

}  // namespace xgdn
