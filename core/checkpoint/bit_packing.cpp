// SPDX-License-Identifier: Apache-2.0
// A weight has up to hundreds of millions of codes, and two of the three orders are transposed: both sides are walked
// in tiles that touch whole cache lines.
#include "core/checkpoint/bit_packing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace xgdn {
namespace {

constexpr int64_t kLine = 64;                                       // bytes of a cache line
constexpr std::array<int, 8> kAwqOrder = {0, 2, 4, 6, 1, 3, 5, 7};  // which neighbour the k-th nibble holds

template <int kBits>
uint8_t code(uint32_t word, int64_t k) {
  return static_cast<uint8_t>(word >> (k * kBits) & ((1U << kBits) - 1));
}

at::Tensor empty_codes(int64_t rows, int64_t columns) {
  return at::empty({rows, columns}, at::kByte);
}

template <int kBits>
at::Tensor rows_of(const at::Tensor& words) {
  constexpr int64_t kCodes = 32 / kBits;
  at::Tensor codes = empty_codes(words.size(0), words.size(1) * kCodes);
  const auto* in = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  auto* out = codes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, words.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < kCodes; ++k) out[i * kCodes + k] = code<kBits>(in[i], k);
    }
  });
  return codes;
}

template <int kBits>
at::Tensor columns_of(const at::Tensor& words) {
  constexpr int64_t kCodes = 32 / kBits;
  constexpr int64_t kTile = kLine / kCodes;  // words whose codes fill a line
  constexpr int64_t kWords = kLine / 4;      // words of a line
  const int64_t num_words = words.size(0);
  const int64_t columns = words.size(1);
  at::Tensor codes = empty_codes(columns, num_words * kCodes);
  const auto* in = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  auto* out = codes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, ceil_div(columns, kWords), 4, [&](int64_t begin, int64_t end) {
    std::array<std::array<uint8_t, kLine>, kWords> tile;  // [column, code]
    for (int64_t w0 = 0; w0 < num_words; w0 += kTile) {
      const int64_t words_here = std::min(kTile, num_words - w0);
      for (int64_t c0 = begin * kWords; c0 < std::min(end * kWords, columns); c0 += kWords) {
        const int64_t columns_here = std::min(kWords, columns - c0);
        for (int64_t w = 0; w < words_here; ++w) {
          const uint32_t* line = in + (w0 + w) * columns + c0;
          for (int64_t c = 0; c < columns_here; ++c) {
            for (int64_t k = 0; k < kCodes; ++k) {
              tile[static_cast<size_t>(c)][static_cast<size_t>(w * kCodes + k)] = code<kBits>(line[c], k);
            }
          }
        }
        for (int64_t c = 0; c < columns_here; ++c) {
          std::memcpy(out + ((c0 + c) * num_words + w0) * kCodes, tile[static_cast<size_t>(c)].data(),
                      static_cast<size_t>(words_here * kCodes));
        }
      }
    }
  });
  return codes;
}

}  // namespace

at::Tensor unpack_rows(const at::Tensor& words, int64_t bits) {
  return bits == 4 ? rows_of<4>(words) : rows_of<8>(words);
}

at::Tensor unpack_columns(const at::Tensor& words, int64_t bits) {
  return bits == 4 ? columns_of<4>(words) : columns_of<8>(words);
}

at::Tensor unpack_awq(const at::Tensor& words) {
  constexpr auto kCodes = static_cast<int64_t>(kAwqOrder.size());
  const int64_t rows = words.size(0);
  const int64_t num_words = words.size(1);
  at::Tensor codes = empty_codes(num_words * kCodes, rows);
  const auto* in = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  auto* out = codes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, num_words, kLine / 4, [&](int64_t begin, int64_t end) {
    std::array<std::array<uint8_t, kLine>, kCodes> tile;  // [neighbour, row]
    for (int64_t r0 = 0; r0 < rows; r0 += kLine) {
      const int64_t rows_here = std::min(kLine, rows - r0);
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t r = 0; r < rows_here; ++r) {
          const uint32_t word = in[(r0 + r) * num_words + w];
          for (int64_t k = 0; k < kCodes; ++k) {
            tile[static_cast<size_t>(kAwqOrder[static_cast<size_t>(k)])][static_cast<size_t>(r)] = code<4>(word, k);
          }
        }
        for (int64_t k = 0; k < kCodes; ++k) {
          std::memcpy(out + (w * kCodes + k) * rows + r0, tile[static_cast<size_t>(k)].data(),
                      static_cast<size_t>(rows_here));
        }
      }
    }
  });
  return codes;
}

}  // namespace xgdn
