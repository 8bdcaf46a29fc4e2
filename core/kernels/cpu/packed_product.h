// SPDX-License-Identifier: Apache-2.0
// Small matrix products over packed operands, the arithmetic of the chunk form:  C (+)= sum over terms of A B.
//
//   A  [rows, depth]  rows behind a free stride
//   B  panels of 16 columns; a panel is f32 [depth, 16] or bf16 [depth / 2, 16, 2] (pairs of rows side by side)
//   C  panels of 16 columns; a panel is f32 [rows, 16]
//
// A term is one pair of operands: a value split into several bf16 parts becomes several terms. Sums are f32, and each
// element of C is summed in the same order whatever rows and panels are computed beside it: first what C holds, then
// term after term, each in ascending depth.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xgdn::kernel::cpu {

inline constexpr size_t kPanel = 16;
inline constexpr size_t kMaxTerms = 6;

/// Element is float or uint16_t, which holds bf16.
template <class Element>
struct Product {
  struct Term {
    const Element* a = nullptr;
    const Element* b = nullptr;
    size_t depth = 0;  // bf16: multiple of 32
  };
  Term terms[kMaxTerms] = {};
  size_t num_terms = 0;
  size_t rows = 0;      // bf16: multiple of BFloat16Products::row_step
  size_t panels = 0;    // of B and C
  size_t a_stride = 0;  // elements from row to row
  size_t b_stride = 0;  // elements from panel to panel
  float* c = nullptr;
  size_t c_stride = 0;          // floats from panel to panel
  bool accumulate = false;      // else C is overwritten
  const void* ahead = nullptr;  // memory that may be fetched to the second-level cache meanwhile
  size_t ahead_bytes = 0;
};

/// bf16 products of one instruction set. A thread brackets its calls of multiply with begin and end.
struct BFloat16Products {
  void (*begin)();
  void (*end)();
  void (*multiply)(const Product<uint16_t>&);
  size_t row_step;
  bool are_tiles;   // many times the rate of f32 vectors; else about twice at best, which splitting operands uses up
  bool are_faster;  // than f32 vectors where operands are bf16 as they come
};

/// The fastest bf16 products that this machine has and instruction_sets.h allows; null: there are none.
const BFloat16Products* bfloat16_products();

}  // namespace xgdn::kernel::cpu
