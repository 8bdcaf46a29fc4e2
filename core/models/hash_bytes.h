// SPDX-License-Identifier: Apache-2.0
// A hash of bytes that is the same on every little-endian machine and in every version: files carry it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

namespace xgdn {

/// The hash of `bytes` behind what has been hashed so far. Not for secrets: who wants equal hashes can make them.
inline uint64_t hash_bytes(uint64_t hash, std::string_view bytes) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;
  const auto mix = [&](uint64_t word) {
    hash = (hash ^ word) * kPrime;
    hash ^= hash >> 32;
  };
  mix(bytes.size());
  for (; bytes.size() >= sizeof(uint64_t); bytes.remove_prefix(sizeof(uint64_t))) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data(), sizeof(word));
    mix(word);
  }
  for (const char byte : bytes) mix(static_cast<unsigned char>(byte));
  return hash;
}

}  // namespace xgdn
