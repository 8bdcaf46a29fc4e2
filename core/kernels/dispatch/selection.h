// SPDX-License-Identifier: Apache-2.0
// Which backend serves a call: the one that is named, or the first that can.
#pragma once

#include <c10/util/StringUtil.h>

#include <atomic>

#include "core/kernels/dispatch/registry.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {

/// The backend of this build with that name, or null.
const Backend* find_backend(std::string_view name);

/// Why no backend of this name is in the build; throws UnsupportedError for a name that the project does not know.
std::string absence(std::string_view context, std::string_view name);

/// Written by every call, read by last_backend().
template <class Params>
inline std::atomic<const Backend*> last_used = nullptr;
/// Written by every call, read by last_is_batch_invariant().
template <class Params>
inline std::atomic<bool> last_was_invariant = false;

/// nullopt: the backend can serve the call; else its sentence.
template <class Params, class Shape>
std::optional<std::string> why_not(const Backend& b, const Params& p, const Shape& s) {
  if (auto sentence = b.why_not_device(Op<Params>::primary(p).device())) return sentence;
  return b.why_not(p, s);
}

template <class Params, class Shape>
const Backend& select(const Params& p, const Shape& s) {
  constexpr std::string_view op = Op<Params>::name;
  const std::string name = p.backend == "auto" ? default_backend(Op<Params>::phase) : p.backend;
  if (name != "auto") {
    const Backend* b = find_backend(name);
    const std::optional<std::string> sentence = b != nullptr ? why_not(*b, p, s) : absence(op, name);
    if (!sentence) return *b;
    throw UnsupportedError(c10::str("[", op, "] backend ", name, " cannot serve this call: ", *sentence));
  }
  std::string sentences;
  for (const Backend* b : backends()) {
    const std::optional<std::string> sentence = why_not(*b, p, s);
    if (!sentence) return *b;
    sentences += c10::str("; ", b->name(), ": ", *sentence);
  }
  for (const AbsentBackend& absent : absent_backends()) sentences += c10::str("; ", absent.name, ": ", absent.why);
  throw UnsupportedError(c10::str("[", op, "] no backend can serve this call", sentences));
}

}  // namespace xgdn::kernel
