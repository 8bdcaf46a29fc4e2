// SPDX-License-Identifier: Apache-2.0
// The tile registers of AMX: their shapes, and whether this process may use them. Linux on x86-64.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace xgdn::kernel::cpu {

inline constexpr size_t kTileRows = 16;
inline constexpr size_t kTileBytes = 64;  // of a row

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

/// What cpuid calls AMX's kinds of products.
enum class TileProducts : uint32_t { kBFloat16 = 1u << 22, kInt8 = 1u << 25 };

/// Whether the processor has them and the operating system saves tile registers, which it does for processes that ask.
inline bool has_tile_products(TileProducts products) {
  constexpr unsigned kAmxTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & static_cast<uint32_t>(products)) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace xgdn::kernel::cpu
