// SPDX-License-Identifier: Apache-2.0
// A weight has up to hundreds of millions of codes, and two of the three orders are transposed: both sides are walked
// in tiles that touch whole cache lines.
#include "core/checkpoint/bit_packing.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>

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
  const int64_t num_words = words.size(0);
  const int64_t columns = words.size(1);
  at::Tensor codes = empty_codes(columns, num_words * kCodes);
  const auto* in = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
  auto* out = codes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, columns, kLine, [&](int64_t begin, int64_t end) {
    for (int64_t w0 = 0; w0 < num_words; w0 += kTile) {
      const int64_t w1 = std::min(w0 + kTile, num_words);
      for (int64_t c = begin; c < end; ++c) {
        uint8_t* row = out + c * num_words * kCodes;
        for (int64_t w = w0; w < w1; ++w) {
          for (int64_t k = 0; k < kCodes; ++k) row[w * kCodes + k] = code<kBits>(in[w * columns + c], k);
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
    for (int64_t r0 = 0; r0 < rows; r0 += kLine) {
      const int64_t r1 = std::min(r0 + kLine, rows);
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t r = r0; r < r1; ++r) {
          const uint32_t word = in[r * num_words + w];
          for (int64_t k = 0; k < kCodes; ++k) {
            out[(w * kCodes + kAwqOrder[static_cast<size_t>(k)]) * rows + r] = code<4>(word, k);
          }
        }
      }
    }
  });
  return codes;
}

}  // namespace xgdn
