// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/load_report.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string_view>

#include "core/checkpoint/json_object.h"

namespace xgdn {
namespace {

constexpr size_t kMostNames = 8;

std::string shortened(const std::vector<std::string>& names) {
  std::vector<std::string> shown;
  for (const std::string& name : names) {
    if (shown.size() == kMostNames) break;
    shown.push_back(quote(name));
  }
  std::string list = c10::Join(", ", shown);
  if (names.size() > shown.size()) list += c10::str(" and ", names.size() - shown.size(), " more");
  return list;
}

// Modules, by bare name, that have a weight of the decoder directly in them.
std::set<std::string, std::less<>> modules_of(const std::set<std::string>& names) {
  std::set<std::string, std::less<>> modules;
  for (const std::string& name : names) {
    const std::string_view bare = bare_name(name);
    modules.emplace(bare.substr(0, bare.rfind('.')));
  }
  return modules;
}

// Whether the tensor belongs to a quantizer of a weight in one of these modules.
bool is_quantizer_of(std::string_view bare, const std::set<std::string, std::less<>>& modules) {
  for (size_t dot = bare.rfind('.'); dot != bare.npos && dot > 0; dot = bare.rfind('.', dot - 1)) {
    if (modules.contains(bare.substr(0, dot))) return is_quantizer_part(bare.substr(dot + 1));
  }
  return false;
}

bool is_of_mtp_head(std::string_view bare) {
  return bare.starts_with("mtp.");
}

}  // namespace

bool has_mtp_head(const Checkpoint& checkpoint) {
  return std::ranges::any_of(checkpoint.names(),
                             [](const std::string& name) { return is_of_mtp_head(bare_name(name)); });
}

std::vector<std::string> LoadReport::warnings() const {
  std::vector<std::string> lines;
  if (uses_own_head) {
    lines.emplace_back(
        "tie_word_embeddings is true, but lm_head.weight is there and differs from the token embedding: it is used");
  }
  if (!unused_tensors.empty()) {
    lines.push_back(c10::str("tensors that the model does not have were ignored: ", shortened(unused_tensors)));
  }
  return lines;
}

LoadReport inspect(const ModelDirectory& opened, DecoderOptions options) {
  const auto& [config, checkpoint] = opened;
  options.device = c10::kMeta;
  options.on_layer_loaded = nullptr;
  options.shard = {};  // what one rank does not use another does
  const CheckpointShapes shapes(checkpoint);
  const HybridDecoder decoder(config, shapes, options);
  const auto modules = modules_of(shapes.asked());
  LoadReport report{.uses_own_head = config.tie_word_embeddings && !decoder.has_tied_head(),
                    .leaves_mtp_head = !options.has_mtp_head && has_mtp_head(checkpoint)};
  std::vector<std::string> quantizers;
  for (const std::string& name : checkpoint.names()) {
    const std::string_view bare = bare_name(name);
    if (shapes.asked().contains(checkpoint.stored_name(name))) continue;
    if (is_other_part(bare) && !(options.has_mtp_head && is_of_mtp_head(bare))) continue;
    (is_quantizer_of(bare, modules) ? quantizers : report.unused_tensors).push_back(name);
  }
  if (!quantizers.empty()) {
    throw checkpoint_error(checkpoint.directory(), "", "no tensors of a quantizer but those that config.json explains",
                           "tensors of a quantizer beside them: " + shortened(quantizers));
  }
  return report;
}

}  // namespace xgdn
