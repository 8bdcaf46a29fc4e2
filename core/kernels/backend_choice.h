// SPDX-License-Identifier: Apache-2.0
// Which backend serves a call: the one that it names, the process-wide one of its phase, or the first that can; and
// what was chosen.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace xgdn::kernel {

/// The two phases for which a backend is chosen. chunk_gated_delta_rule and causal_conv1d belong to prefill, all other
/// ops to decode.
enum class Phase { kPrefill, kDecode };

/// Throws UnsupportedError unless `name` is "auto" or a backend of this build, with its sentence where it is absent.
void check_backend_name(const std::string& name);

/// Process-wide choice behind backend = "auto": a backend's name, or "auto" for the order of preference. Starts from
/// the environment: XGDN_PREFILL_BACKEND, XGDN_DECODE_BACKEND. Throws UnsupportedError for an unknown name.
void set_default_backend(Phase phase, const std::string& name);
/// As set, or "auto".
std::string default_backend(Phase phase);

/// Names of the backends that can run in this process, in order of preference.
std::vector<std::string> available_backends();

/// The backend that served the last call of `op` in this process, or "" before the first. All engines and threads of
/// the process share the answer.
std::string last_backend(std::string_view op);

/// Whether the last call of `op` in this process was batch-invariant: each of its sequences (tokens, where the op has
/// no sequences) has the bits that it would have alone, in any other batch, and with any number of threads. Backends
/// promise it where their own kernels serve the call, never where a library makes a product. False before the first
/// call.
bool last_is_batch_invariant(std::string_view op);

/// One row of doctor(): whether `backend` serves `op` on host tensors of a typical shape, else its sentence.
struct BackendReport {
  std::string op;
  std::string backend;
  std::optional<std::string> why_not;  // nullopt: it serves the op
  bool is_selected;                    // what "auto" runs now
  bool is_batch_invariant = false;     // it serves the op, and that call is (last_is_batch_invariant)
};
/// A row for each op and each backend of this build.
std::vector<BackendReport> doctor();

}  // namespace xgdn::kernel
