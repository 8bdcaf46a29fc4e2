// SPDX-License-Identifier: Apache-2.0
// A tile of a paged context as operands of packed_product.h: keys as panels of K^T, values as panels of V. Of int8 rows
// these are the codes, which every operand holds exactly; their scales belong to a row of the tile each.
#if defined(XGDN_CORE_KERNELS_CPU_ATTENTION_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_ATTENTION_TILE_INL_H_
#undef XGDN_CORE_KERNELS_CPU_ATTENTION_TILE_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_ATTENTION_TILE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/kernels/cpu/packed_product-inl.h"
#include "core/kernels/cpu/paged_attention.h"
#include "core/kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

inline constexpr size_t kTile = 128;  // rows of the context
inline constexpr size_t kRowsAhead = 16;

// A key head's rows of a context, in the pool of keys or in that of values.
struct ContextRows {
  const PagedAttentionArgs& args;
  const int32_t* blocks;
  int64_t head;
  const void* pool;
  size_t num_rows;

  const void* at(size_t i) const {
    const auto B = static_cast<size_t>(args.B);
    const int64_t row = blocks[i / B] * args.B + static_cast<int64_t>(i % B);
    return static_cast<const char*>(pool) + (row * args.HKV + head) * args.cache_rows.bytes;
  }
  // The row, while a later one comes from memory: rows lie too far apart for the processor to see that they are next.
  const void* read(size_t i) const {
    if (i + kRowsAhead < num_rows) prefetch(at(i + kRowsAhead), static_cast<size_t>(args.cache_rows.bytes));
    return at(i);
  }
  // Of a row of int8.
  float scale(size_t i) const {
    float scale;
    std::memcpy(&scale, static_cast<const char*>(at(i)) + args.D, sizeof(scale));
    return scale;
  }
};

// Rows [begin, begin + count) of the context.
struct TileRows {
  size_t begin;
  size_t count;
};

// ---- keys -----------------------------------------------------------------------------------------------------------

// 16 rows of 16-bit pairs [16, depth / 2] become a panel of bf16, or of f32.
inline void transpose_pairs(const uint16_t* rows, size_t depth, uint16_t* panel, float*) {
  transpose(rows, kPanel, depth / 2, depth / 2, panel, kPanel);
}

inline void transpose_pairs(const uint16_t* rows, size_t depth, float* panel, float* words) {
  const F32 d;
  const U32 u;
  transpose(rows, kPanel, depth / 2, depth / 2, words, kPanel);
  for (size_t i = 0; i < depth / 2; ++i) {
    for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
      const auto pair = hn::BitCast(u, hn::Load(d, words + i * kPanel + lane));
      hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(pair)), d, panel + 2 * i * kPanel + lane);
      hn::Store(hn::BitCast(d, hn::And(pair, hn::Set(u, 0xFFFF0000u))), d, panel + (2 * i + 1) * kPanel + lane);
    }
  }
}

// The integer in byte `byte`, counted from the low one, of each lane.
template <int kByte>
HWY_INLINE VF widen_byte(hn::Vec<I32> bytes) {
  return hn::ConvertTo(F32(), hn::ShiftRight<24>(hn::ShiftLeft<24 - 8 * kByte>(bytes)));
}

// 16 rows of int8 [16, depth] become a panel, without their scales.
template <class Element>
void transpose_codes(const int8_t* rows, size_t depth, Element* panel, float* words) {
  const F32 d;
  transpose(rows, kPanel, depth / 4, depth / 4, words, kPanel);
  for (size_t i = 0; i < depth / 4; ++i) {
    for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
      const auto four = hn::BitCast(I32(), hn::Load(d, words + i * kPanel + lane));
      store_pair<1>(d, widen_byte<0>(four), widen_byte<1>(four), pair_at(panel, 2 * i, lane), 0);
      store_pair<1>(d, widen_byte<2>(four), widen_byte<3>(four), pair_at(panel, 2 * i + 1, lane), 0);
    }
  }
}

// Panels [tile / 16][depth, 16] of K^T; columns and depth beyond the rows are zero. `rows` is memory for
// 2 * 16 * depth floats.
template <class Element>
void pack_keys(const ContextRows& context, const TileRows& tile, size_t depth, float* rows, Element* panels) {
  const DType dtype = context.args.q.dtype;
  const auto D = static_cast<size_t>(context.args.D);
  for (size_t first = 0; first < tile.count; first += kPanel) {
    const size_t count = std::min(kPanel, tile.count - first);
    Element* panel = panels + first * depth;
    if (context.args.cache_rows.are_int8) {
      auto* gathered = reinterpret_cast<int8_t*>(rows);
      if (count < kPanel || D < depth) std::memset(gathered, 0, kPanel * depth);
      for (size_t i = 0; i < count; ++i) {
        std::memcpy(gathered + i * depth, context.read(tile.begin + first + i), D);
      }
      transpose_codes(gathered, depth, panel, rows + kPanel * depth);
    } else if (dtype == DType::kBFloat16) {
      auto* gathered = reinterpret_cast<uint16_t*>(rows);
      if (count < kPanel || D < depth) std::memset(gathered, 0, kPanel * depth * sizeof(uint16_t));
      for (size_t i = 0; i < count; ++i) {
        std::memcpy(gathered + i * depth, context.read(tile.begin + first + i), D * sizeof(uint16_t));
      }
      transpose_pairs(gathered, depth, panel, rows + kPanel * depth);
    } else if constexpr (std::is_same_v<Element, float>) {
      if (count < kPanel || D < depth) std::memset(rows, 0, kPanel * depth * sizeof(float));
      for (size_t i = 0; i < count; ++i) {
        load_row(dtype, context.read(tile.begin + first + i), D, rows + i * depth);
      }
      transpose(rows, kPanel, depth, depth, panel, kPanel);
    }
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

template <class T, class Element, class Load>
void pack_values_with(const ContextRows& context, const TileRows& tile, size_t depth, size_t width, Element* panels,
                      const Load& load_vector) {
  const F32 d;
  const auto D = static_cast<size_t>(context.args.D);
  const T zeros[kPanel] = {};
  T tails[2][kPanel] = {};  // of rows whose D ends inside a panel
  for (size_t i = 0; i < depth; i += 2) {
    const auto row = [&](size_t r) {
      return i + r < tile.count ? static_cast<const T*>(context.read(tile.begin + i + r)) : nullptr;
    };
    const T* const even = row(0);
    const T* const odd = row(1);
    for (size_t column = 0; column < width; column += kPanel) {
      const auto piece = [&](const T* from, T* tail) -> const T* {
        if (from == nullptr) return zeros;
        if (column + kPanel <= D) return from + column;
        std::memcpy(tail, from + column, (D - column) * sizeof(T));
        return tail;
      };
      const T* const even_piece = piece(even, tails[0]);
      const T* const odd_piece = piece(odd, tails[1]);
      for (size_t lane = 0; lane < kPanel; lane += hn::Lanes(d)) {
        store_pair<1>(d, load_vector(d, even_piece + lane), load_vector(d, odd_piece + lane),
                      pair_at(panels + column * kTile, i / 2, lane), 0);
      }
    }
  }
}

HWY_INLINE VF load_codes(F32 d, const int8_t* p) {
  return hn::ConvertTo(d, hn::PromoteTo(I32(), hn::LoadU(hn::Rebind<int8_t, F32>(), p)));
}

// Panels [width / 16][depth, 16] of V, kTile * 16 elements apart; rows and columns beyond the tile's are zero.
template <class Element>
void pack_values(const ContextRows& context, const TileRows& tile, size_t depth, size_t width, Element* panels) {
  if (context.args.cache_rows.are_int8) {
    return pack_values_with<int8_t>(context, tile, depth, width, panels,
                                    [](F32 d, const int8_t* p) HWY_ATTR { return load_codes(d, p); });
  }
  switch (context.args.q.dtype) {
    case DType::kFloat32:
      return pack_values_with<float>(context, tile, depth, width, panels,
                                     [](F32 d, const float* p) HWY_ATTR { return load(d, p); });
    case DType::kBFloat16:
      return pack_values_with<uint16_t>(context, tile, depth, width, panels,
                                        [](F32 d, const uint16_t* p) HWY_ATTR { return load(d, p); });
    case DType::kFloat16:
      return pack_values_with<uint16_t>(context, tile, depth, width, panels,
                                        [](F32 d, const uint16_t* p) HWY_ATTR { return load_float16(d, p); });
  }
}

// Where column `column` of a row lies in packed values.
inline float* value_at(float* panels, size_t row, size_t column) {
  return panels + column / kPanel * kPanel * kTile + row * kPanel + column % kPanel;
}
inline uint16_t* value_at(uint16_t* panels, size_t row, size_t column) {
  return pair_at(panels + column / kPanel * kPanel * kTile, row / 2, column % kPanel) + row % 2;
}

// Calls f(row, column, value) for the infinite and NaN values of rows [first, tile.count), which codes never are.
// `memory` holds D floats.
template <class F>
void for_each_special_value(const ContextRows& context, const TileRows& tile, size_t first, float* memory, const F& f) {
  if (context.args.cache_rows.are_int8) return;
  const auto D = static_cast<size_t>(context.args.D);
  for (size_t row = first; row < tile.count; ++row) {
    load_row(context.args.q.dtype, context.at(tile.begin + row), D, memory);
    for (size_t column = 0; column < D; ++column) {
      if (!std::isfinite(memory[column])) f(row, column, memory[column]);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_ATTENTION_TILE_INL_H_
