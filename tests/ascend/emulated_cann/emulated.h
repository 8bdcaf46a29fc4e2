// SPDX-License-Identifier: Apache-2.0
// What the emulated libraries share: device memory, streams, the launch ledger, switches, the last error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace emulated_cann {

// aclnn return codes.
inline constexpr int kOk = 0;
inline constexpr int kNullPointer = 161001;
inline constexpr int kInvalidParameter = 161002;
inline constexpr int kInnerError = 561000;
inline constexpr int kTilingError = 561002;
inline constexpr int kKernelException = 507015;  // what a stream reports after a kernel has failed

// Every byte of new memory. As bf16 and fp32 it is a huge negative number, as int32 a negative index.
inline constexpr int kPoison = 0xFB;

// Whether the bytes lie inside one live device allocation.
bool on_device(const void* begin, size_t bytes);
// The device of that allocation.
std::optional<int> device_of(const void* begin, size_t bytes);

// Work that waits for other processes. Everything else has happened when its call returns. Returns what went wrong, or
// "".
using Job = std::function<std::string()>;
void enqueue(void* stream, Job job);
// Until the stream's jobs have run: before anything else happens on it.
void await_stream(void* stream);

// Remembers the sentence for aclGetRecentErrMsg, writes it to the ledger and returns `status`.
int fail(int status, const std::string& sentence);

// A switch by its short name: what emulated_cann_set gave it, else the environment's EMULATED_CANN_<NAME>, else "".
std::string setting(const std::string& name);
bool is_on(const std::string& name, bool otherwise = false);
bool lists(const std::string& name, std::string_view item);  // item in a comma-separated switch

// Appends one line of JSON.
void record(std::string line);
// The same, in the place of the last line if that is `last`.
void replace_last(std::string_view last, std::string line);
std::string quoted(std::string_view text);
std::string sync_line(std::string_view what);

}  // namespace emulated_cann
