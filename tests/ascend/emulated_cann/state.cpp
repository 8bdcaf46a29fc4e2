// SPDX-License-Identifier: Apache-2.0
// The ledger, the switches and the last error, with their C interface for Python (ledger.py).
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

#include "emulated.h"

namespace emulated_cann {
namespace {

struct State {
  std::mutex mutex;
  std::vector<std::string> ledger;
  std::map<std::string, std::string> settings;
};

// Never destroyed: torch_npu frees memory and streams while the process exits.
State& state() {
  static auto* const instance = new State;
  return *instance;
}

thread_local std::string last_error;
thread_local std::string answer;

std::string joined(const std::vector<std::string>& lines) {
  std::string all;
  for (const std::string& line : lines) all += line + '\n';
  return all;
}

}  // namespace

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + '"';
}

std::string sync_line(std::string_view what) {
  return "{\"kind\": \"sync\", \"what\": \"" + std::string(what) + "\"}";
}

void record(std::string line) {
  const std::lock_guard lock(state().mutex);
  state().ledger.push_back(std::move(line));
}

void replace_last(std::string_view last, std::string line) {
  const std::lock_guard lock(state().mutex);
  std::vector<std::string>& ledger = state().ledger;
  if (!ledger.empty() && ledger.back() == last) ledger.pop_back();
  ledger.push_back(std::move(line));
}

int fail(int status, const std::string& sentence) {
  last_error = "emulated CANN: " + sentence;
  record("{\"kind\": \"refusal\", \"status\": " + std::to_string(status) + ", \"message\": " + quoted(sentence) + "}");
  return status;
}

std::string setting(const std::string& name) {
  {
    const std::lock_guard lock(state().mutex);
    const auto found = state().settings.find(name);
    if (found != state().settings.end()) return found->second;
  }
  const char* value = std::getenv(("EMULATED_CANN_" + name).c_str());
  return value == nullptr ? "" : value;
}

bool is_on(const std::string& name, bool otherwise) {
  const std::string value = setting(name);
  return value.empty() ? otherwise : value != "0";
}

bool lists(const std::string& name, std::string_view item) {
  std::istringstream items(setting(name));
  for (std::string each; std::getline(items, each, ',');) {
    if (each == item) return true;
  }
  return false;
}

}  // namespace emulated_cann

using emulated_cann::state;

extern "C" {

const char* aclGetRecentErrMsg() {
  return emulated_cann::last_error.empty() ? nullptr : emulated_cann::last_error.c_str();
}

// nullptr gives the switch back to the environment.
void emulated_cann_set(const char* name, const char* value) {
  const std::lock_guard lock(state().mutex);
  if (value == nullptr) {
    state().settings.erase(name);
  } else {
    state().settings[name] = value;
  }
}

void emulated_cann_ledger_reset() {
  const std::lock_guard lock(state().mutex);
  state().ledger.clear();
}

// JSON lines, valid until the thread's next call.
const char* emulated_cann_ledger() {
  const std::lock_guard lock(state().mutex);
  emulated_cann::answer = emulated_cann::joined(state().ledger);
  return emulated_cann::answer.c_str();
}

int emulated_cann_ledger_dump(const char* path) {
  const std::lock_guard lock(state().mutex);
  std::ofstream file(path);
  file << emulated_cann::joined(state().ledger);
  return file.good() ? 0 : 1;
}
}
