// SPDX-License-Identifier: Apache-2.0
// The loops of integer_tiles.h. Tiles hold 16 outputs and up to 16 rows of tokens: tokens are the left operand, so that
// a row of sums is a vector of outputs, which AVX-512 scales and adds to what stays in registers from group to group.
#include "core/kernels/cpu/instruction_sets.h"
#include "core/kernels/cpu/integer_tiles.h"

#if defined(__x86_64__) && defined(__linux__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 takes what its own intrinsics leave undefined for a fault
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <utility>

#include "core/kernels/cpu/tiles_x86.h"

namespace xgdn::kernel::cpu {
namespace {

#define XGDN_INTEGER_TILES __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw")))

// Tiles: 0 sums, 1 tokens, 2 codes of even groups, 3 to 5 of odd ones. Two groups are under way at once.
XGDN_INTEGER_TILES void begin_tiles(size_t num_rows, size_t group_size) {
  const size_t depth = std::min(group_size, kTileBytes);
  TileConfig config;
  const auto set = [&](int tile, size_t rows, size_t row_bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  };
  for (const int first : {0, 3}) {
    set(first, num_rows, kTileBytes);
    set(first + 1, num_rows, depth);
    set(first + 2, depth / 4, kTileBytes);
  }
  asm volatile("" ::"r"(&config) : "memory");  // the compiler thinks that only the first bytes are read
  _tile_loadconfig(&config);
}

XGDN_INTEGER_TILES void end_tiles() {
  _tile_release();
}

constexpr size_t kGroupsAtOnce = 8;

// A group's sums of each row of a token.
struct alignas(64) GroupSums {
  int32_t of_row[kTileTokenRows][kTileRows];
};

template <bool kIsOdd>
XGDN_INTEGER_TILES inline void multiply_group(const GroupProducts& p, size_t group, GroupSums& sums) {
  const uint8_t* codes = p.codes + group * p.group_size * kTileRows;
  const int8_t* tokens = p.tokens + group * p.group_size;
  if constexpr (kIsOdd) {
    _tile_zero(3);
  } else {
    _tile_zero(0);
  }
  for (size_t d = 0; d < p.group_size; d += kTileBytes) {
    if (p.bytes_ahead > 0) {
      const uint8_t* ahead = codes + d * kTileRows + p.bytes_ahead;
      for (size_t line = 0; line < std::min(p.group_size, kTileBytes) / 4; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line * kTileBytes), _MM_HINT_T0);
      }
    }
    if constexpr (kIsOdd) {
      _tile_loadd(4, tokens + d, p.token_stride);
      _tile_loadd(5, codes + d * kTileRows, kTileBytes);
      _tile_dpbssd(3, 4, 5);
    } else {
      _tile_loadd(1, tokens + d, p.token_stride);
      _tile_loadd(2, codes + d * kTileRows, kTileBytes);
      _tile_dpbssd(0, 1, 2);
    }
  }
  if constexpr (kIsOdd) {
    _tile_stored(3, sums.of_row, kTileBytes);
  } else {
    _tile_stored(0, sums.of_row, kTileBytes);
  }
}

template <size_t kTokens, size_t kTokenRows, bool kHasZeros>
XGDN_INTEGER_TILES inline void add_group(const GroupProducts& p, size_t group, const GroupSums& from,
                                         __m512 (&sums)[kTokens]) {
  const __m512 scales = _mm512_loadu_ps(p.scales + group * kTileRows);
  __m512i zeros = _mm512_setzero_si512();
  if constexpr (kHasZeros) {
    zeros = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.zeros + group * kTileRows)));
  }
#pragma GCC unroll 16
  for (size_t t = 0; t < kTokens; ++t) {
    const size_t at = t * p.token_group_stride + group;
    __m512i sum = _mm512_load_si512(from.of_row[kTokenRows * t]);
    if constexpr (kTokenRows == 2) {
      sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(from.of_row[2 * t + 1]));
    }
    if constexpr (kHasZeros) {
      sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(p.token_starts[at])));
    }
    const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(p.token_scales[at]));
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, sums[t]);
  }
}

// Some groups are multiplied before they are scaled: what tiles store takes long to be loaded again.
template <size_t kTokens, size_t kTokenRows, bool kHasZeros>
XGDN_INTEGER_TILES void multiply_tokens(const GroupProducts& p) {
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  GroupSums group_sums[kGroupsAtOnce];
  __m512 sums[kTokens];
#pragma GCC unroll 16
  for (size_t t = 0; t < kTokens; ++t) sums[t] = _mm512_loadu_ps(p.sums + t * p.sum_stride);
  for (size_t first = 0; first < p.num_groups; first += kGroupsAtOnce) {
    const size_t count = std::min(kGroupsAtOnce, p.num_groups - first);
    for (size_t i = 0; i < count; i += 2) {
      multiply_group<false>(p, first + i, group_sums[i]);
      if (i + 1 < count) multiply_group<true>(p, first + i + 1, group_sums[i + 1]);
    }
    asm volatile("" ::: "memory");
    for (size_t i = 0; i < count; ++i) add_group<kTokens, kTokenRows, kHasZeros>(p, first + i, group_sums[i], sums);
  }
#pragma GCC unroll 16
  for (size_t t = 0; t < kTokens; ++t) _mm512_storeu_ps(p.sums + t * p.sum_stride, sums[t]);
}

using Multiply = void (*)(const GroupProducts&);

template <size_t kTokenRows, bool kHasZeros, size_t... kBefore>
constexpr auto functions_of_counts(std::index_sequence<kBefore...>) {
  return std::array<Multiply, sizeof...(kBefore)>{multiply_tokens<kBefore + 1, kTokenRows, kHasZeros>...};
}

template <size_t kTokenRows>
Multiply function_of(const GroupProducts& p) {
  constexpr auto kCounts = std::make_index_sequence<kTileTokenRows / kTokenRows>();
  static constexpr auto kPlain = functions_of_counts<kTokenRows, false>(kCounts);
  static constexpr auto kWithZeros = functions_of_counts<kTokenRows, true>(kCounts);
  return (p.zeros == nullptr ? kPlain : kWithZeros)[p.T - 1];
}

void multiply(const GroupProducts& p) {
  (p.token_rows == 1 ? function_of<1>(p) : function_of<2>(p))(p);
}

XGDN_INTEGER_TILES void split(const int16_t* x, size_t count, Codes format, int8_t* high, int8_t* low) {
  // Within eight elements, high bytes to the lower half, low bytes to the upper one.
  const __m128i of_eight = format == Codes::kInt8 ? _mm_setr_epi8(1, 5, 3, 7, 9, 13, 11, 15, 0, 4, 2, 6, 8, 12, 10, 14)
                                                  : _mm_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14);
  const __m512i bytes = _mm512_broadcast_i32x4(of_eight);
  const __m512i halves = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i half = _mm512_set1_epi16(0x80);  // so that low bytes have a sign
  for (size_t i = 0; i < count; i += 32) {
    const __m512i rounded = _mm512_add_epi16(_mm512_loadu_si512(x + i), half);
    const __m512i words = _mm512_xor_si512(rounded, half);
    const __m512i both = _mm512_permutexvar_epi64(halves, _mm512_shuffle_epi8(words, bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), _mm512_castsi512_si256(both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i), _mm512_extracti64x4_epi64(both, 1));
  }
}

constexpr IntegerTiles kTiles = {begin_tiles, end_tiles, multiply, split};

bool are_allowed() {
  return best_allowed_instruction_set() >= InstructionSet::kAmx && __builtin_cpu_supports("avx512bw") &&
         has_tile_products(TileProducts::kInt8);
}

}  // namespace

const IntegerTiles* integer_tiles() {
  static const IntegerTiles* tiles = are_allowed() ? &kTiles : nullptr;
  return tiles;
}

}  // namespace xgdn::kernel::cpu

#else

namespace xgdn::kernel::cpu {

const IntegerTiles* integer_tiles() {
  return nullptr;
}

}  // namespace xgdn::kernel::cpu

#endif
