// SPDX-License-Identifier: Apache-2.0
// Names in a file: "tokens" and "num_kept"; "layers.I.COMPONENT" of the I-th GDN layer; "attention.I.k" and ".v" of the
// I-th attention layer; and "NAME.digest" beside each, one number a head, or one for a tensor without heads.
#include "core/runtime/session_file.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "core/checkpoint/safetensors.h"
#include "core/layers/qwen3_gated_delta_net.h"
#include "core/models/hash_bytes.h"

namespace xgdn {
namespace {

const std::string kFormat = "xgdn.session";
const std::string kVersion = "1";
const std::string kDigest = ".digest";

struct ComponentName {
  const char* name;
  bool has_heads;  // its first dimension is of heads
};

ComponentName name_of(StateKind kind) {
  switch (kind) {
    case StateKind::kConv:
      return {"conv", false};
    case StateKind::kDelta:
      return {"state", true};
    case StateKind::kRingK:
      return {"ring.k", true};
    case StateKind::kRingU:
      return {"ring.u", true};
    case StateKind::kRingG:
      return {"ring.g", true};
    case StateKind::kRingLength:
      return {"ring.length", false};
  }
  throw Error("[Session] a component without a name");
}

// A tensor's bytes, head by head; heads_dim -1: it has none.
at::Tensor digests(const at::Tensor& tensor, int64_t heads_dim) {
  const at::Tensor by_head = (heads_dim < 0 ? tensor.unsqueeze(0) : tensor.movedim(heads_dim, 0)).contiguous();
  const int64_t num_heads = by_head.size(0);
  at::Tensor digests = at::empty({num_heads}, at::kLong);
  const size_t bytes = by_head.nbytes() / static_cast<size_t>(std::max<int64_t>(num_heads, 1));
  for (int64_t head = 0; head < num_heads; ++head) {
    const char* begin = static_cast<const char*>(by_head.const_data_ptr()) + static_cast<size_t>(head) * bytes;
    digests.mutable_data_ptr<int64_t>()[head] = static_cast<int64_t>(hash_bytes(0, {begin, bytes}));
  }
  return digests;
}

// Calls f(name, heads_dim, shape, dtype, tensor) for each tensor that a session with a state has.
template <class F>
void for_tensors(const SessionSpecs& specs, SavedSession& session, const F& f) {
  auto& [states, kv] = session.memory;
  states.resize(specs.states.size());
  for (size_t i = 0; i < specs.states.size(); ++i) {
    states[i].resize(specs.states[i].size());
    for (size_t j = 0; j < specs.states[i].size(); ++j) {
      const StateSpec& spec = specs.states[i][j];
      const auto [name, has_heads] = name_of(spec.kind);
      f(c10::str("layers.", i, ".", name), has_heads ? 0 : -1, spec.slot_shape, spec.dtype, states[i][j]);
    }
  }
  kv.resize(static_cast<size_t>(specs.num_attention_layers));
  const std::vector<int64_t> rows{session.num_kept, specs.num_kv_heads, specs.kv_row_size};
  for (size_t i = 0; i < kv.size(); ++i) {
    f(c10::str("attention.", i, ".k"), 1, rows, specs.kv_dtype, kv[i].k);
    f(c10::str("attention.", i, ".v"), 1, rows, specs.kv_dtype, kv[i].v);
  }
}

class Reader {
 public:
  explicit Reader(const std::filesystem::path& path) : path_(path), file_(path) {}

  void check_metadata(const std::string& key, const std::string& expected, const char* what) const {
    const auto it = file_.metadata().find(key);
    const std::string got = it == file_.metadata().end() ? "none" : it->second;
    if (got != expected) throw error(key, c10::str(expected, ", ", what), got);
  }

  at::Tensor read(const std::string& name, int64_t heads_dim, const std::vector<int64_t>& shape,
                  at::ScalarType dtype) const {
    at::Tensor tensor = read_any(name, shape.size(), dtype);
    if (tensor.sizes() != at::IntArrayRef(shape)) {
      throw error(name, c10::str(at::IntArrayRef(shape)), c10::str(tensor.sizes()));
    }
    check_digests(name, tensor, heads_dim);
    return tensor;
  }

  at::Tensor read_tokens() const {
    at::Tensor tokens = read_any("tokens", 1, at::kInt);
    check_digests("tokens", tokens, -1);
    return tokens;
  }

  /// Whether there are tensors of no other names, as there are where states are of another kind.
  void check_names(const std::set<std::string>& names) const {
    for (const auto& [name, entry] : file_.entries()) {
      const bool is_digest = name.ends_with(kDigest);
      if (names.contains(is_digest ? name.substr(0, name.size() - kDigest.size()) : name)) continue;
      throw error(name, "no tensor of that name", "one");
    }
  }

  CheckpointError error(const std::string& subject, const std::string& expected, const std::string& got) const {
    return CheckpointError(
        c10::str("[Session] ", path_.string(), ": ", subject, ": expected ", expected, ", got ", got));
  }

 private:
  at::Tensor read_any(const std::string& name, size_t rank, at::ScalarType dtype) const {
    if (!file_.contains(name)) throw error(name, "a tensor of that name", "none");
    at::Tensor tensor = file_.tensor(name).clone();  // the file may go
    if (tensor.scalar_type() != dtype || tensor.dim() != static_cast<int64_t>(rank)) {
      throw error(name, c10::str(c10::toString(dtype), " of ", rank, " dimensions"),
                  c10::str(c10::toString(tensor.scalar_type()), " of ", tensor.dim()));
    }
    return tensor;
  }

  void check_digests(const std::string& name, const at::Tensor& tensor, int64_t heads_dim) const {
    const at::Tensor want = read_any(name + kDigest, 1, at::kLong);
    const at::Tensor got = digests(tensor, heads_dim);
    for (int64_t head = 0; head < got.size(0); ++head) {
      if (want.size(0) == got.size(0) && want[head].equal(got[head])) continue;
      throw error(name, "the bytes that were written", c10::str("others, in head ", head));
    }
  }

  const std::filesystem::path& path_;
  SafetensorsFile file_;
};

// Numbers that no step leaves: checkpoints that are not finite, and rings that hold other tokens than those since then.
void check_states(const Reader& reader, const SessionSpecs& specs, const SavedSession& session) {
  for (size_t i = 0; i < specs.states.size(); ++i) {
    for (size_t j = 0; j < specs.states[i].size(); ++j) {
      const StateKind kind = specs.states[i][j].kind;
      const at::Tensor& tensor = session.memory.states[i][j];
      const std::string name = c10::str("layers.", i, ".", name_of(kind).name);
      if (kind == StateKind::kDelta && !tensor.isfinite().all().item<bool>()) {
        throw reader.error(name, "finite numbers", "NaN or infinity");
      }
      if (kind != StateKind::kRingLength) continue;
      const int64_t length = session.num_kept % kReplayChunk;
      if (tensor.item<int32_t>() == length) continue;
      throw reader.error(name, c10::str(length, ", num_kept=", session.num_kept, " modulo ", kReplayChunk),
                         c10::str(tensor.item<int32_t>()));
    }
  }
}

std::string model_text(const SessionSpecs& specs) {
  return std::to_string(specs.model_digest);
}

}  // namespace

void write_session(const std::filesystem::path& path, const SavedSession& session, const SessionSpecs& specs) {
  std::map<std::string, at::Tensor> tensors;
  const auto put = [&](const std::string& name, const at::Tensor& tensor, int64_t heads_dim) {
    tensors[name] = tensor;
    tensors[name + kDigest] = digests(tensor, heads_dim);
  };
  put("tokens", at::tensor(session.tokens, at::kInt), -1);
  put("num_kept", at::tensor({session.num_kept}, at::kLong), -1);
  if (session.num_kept > 0) {
    SavedSession kept = session;
    for_tensors(specs, kept,
                [&](const std::string& name, int64_t heads_dim, const std::vector<int64_t>&, at::ScalarType,
                    at::Tensor& tensor) { put(name, tensor, heads_dim); });
  }
  write_safetensors(path, tensors, {{"format", kFormat}, {"version", kVersion}, {"model", model_text(specs)}});
}

SavedSession read_session(const std::filesystem::path& path, const SessionSpecs& specs) {
  const Reader reader(path);
  reader.check_metadata("format", kFormat, "the format of sessions");
  reader.check_metadata("version", kVersion, "the version that this library reads");
  reader.check_metadata("model", model_text(specs), "the digest of the model that is loaded");
  SavedSession session;
  const at::Tensor tokens = reader.read_tokens();
  session.tokens.assign(tokens.const_data_ptr<int32_t>(), tokens.const_data_ptr<int32_t>() + tokens.numel());
  for (const int32_t token : session.tokens) {
    if (token < 0 || token >= specs.vocab_size) {
      throw reader.error("tokens", c10::str("token ids 0..", specs.vocab_size - 1), std::to_string(token));
    }
  }
  session.num_kept = reader.read("num_kept", -1, {1}, at::kLong).item<int64_t>();
  if (session.num_kept == 0) return session;
  if (session.num_kept < specs.least_kept || session.num_kept > std::ssize(session.tokens)) {
    throw reader.error("num_kept", c10::str("0 or ", specs.least_kept, "..", session.tokens.size(), " tokens"),
                       std::to_string(session.num_kept));
  }
  std::set<std::string> names{"tokens", "num_kept"};
  for_tensors(specs, session,
              [&](const std::string& name, int64_t heads_dim, const std::vector<int64_t>& shape, at::ScalarType dtype,
                  at::Tensor& tensor) {
                tensor = reader.read(name, heads_dim, shape, dtype);
                names.insert(name);
              });
  reader.check_names(names);
  check_states(reader, specs, session);
  return session;
}

}  // namespace xgdn
