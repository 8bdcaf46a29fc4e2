// SPDX-License-Identifier: Apache-2.0
// Once per key head and chunk: k and q as operands of products, K K^T (the ungated part of FLA's scaled_dot_kkt), Q K^T
// and the norms.
#if defined(XGDN_CORE_KERNELS_CPU_CHUNK_KEYS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef XGDN_CORE_KERNELS_CPU_CHUNK_KEYS_INL_H_
#undef XGDN_CORE_KERNELS_CPU_CHUNK_KEYS_INL_H_
#else
#define XGDN_CORE_KERNELS_CPU_CHUNK_KEYS_INL_H_
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/kernels/cpu/chunk_work-inl.h"

HWY_BEFORE_NAMESPACE();
namespace xgdn::kernel::cpu {
namespace HWY_NAMESPACE {

template <size_t kParts, class Element>
HWY_INLINE void stage_row(DType dtype, const void* from, size_t K, Element* to, size_t part_stride) {
  const F32 d;
  if (kParts == 1 && dtype == DType::kBFloat16 && std::is_same_v<Element, uint16_t>) {
    for (size_t i = 0; i < K; i += hn::Lanes(d)) {
      hn::StoreU(hn::LoadU(U16(), static_cast<const uint16_t*>(from) + i), U16(), reinterpret_cast<uint16_t*>(to) + i);
    }
    return;
  }
  HWY_ALIGN float row[kMaxDim];
  load_row(dtype, from, K, row);
  for (size_t i = 0; i < K; i += hn::Lanes(d)) {
    store_lanes<kParts>(d, hn::Load(d, row + i), to + i, part_stride);
  }
}

template <class M>
void stage_rows(const InRows& from, int64_t key_head, int64_t token, size_t count, const Work<M>& w,
                typename M::Element* to) {
  for (size_t t = 0; t < count; ++t) {
    stage_row<M::kKeys>(from.dtype, from.at(token + t, key_head), w.K, to + t * w.depth, w.keys_size());
  }
  for (size_t part = 0; part < M::kKeys; ++part) {
    std::fill(to + part * w.keys_size() + count * w.depth, to + (part + 1) * w.keys_size(), typename M::Element{0});
  }
}

HWY_INLINE VF load_elements(F32 d, const uint16_t* from) {
  return load(d, from);
}
HWY_INLINE VF load_elements(F32 d, const float* from) {
  return hn::Load(d, from);
}

// |k|^-1 from the diagonal of K K^T, |q|^-1 from the rows.
template <class M>
void find_scales(bool normalise, Work<M>& w) {
  const F32 d;
  for (size_t t = 0; t < M::kChunk; ++t) {
    w.k_scale[t] = w.kk[t / kPanel * M::kChunk * kPanel + t * kPanel + t % kPanel];
    VF sum = hn::Zero(d);
    for (size_t i = 0; i < w.K; i += hn::Lanes(d)) {
      const VF x = load_elements(d, w.q_rows + t * w.depth + i);
      sum = hn::MulAdd(x, x, sum);
    }
    w.q_scale[t] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
  const VF one = hn::Set(d, 1.0f), eps = hn::Set(d, kNormEps);
  for (size_t t = 0; t < M::kChunk; t += hn::Lanes(d)) {
    for (float* scale : {w.k_scale + t, w.q_scale + t}) {
      const VF inverse = normalise ? hn::Div(one, hn::Sqrt(hn::Add(hn::Load(d, scale), eps))) : one;
      hn::Store(inverse, d, scale);
    }
  }
}

// K^T as rows of A, from its panels.
inline void split_columns(const Work<BFloat16Mode>& w) {
  using M = BFloat16Mode;
  const U32 u;
  const uint32_t* panels = reinterpret_cast<const uint32_t*>(w.k_panels);
  for (size_t i = 0; i < w.K / 2; ++i) {
    for (size_t t = 0; t < M::kChunk; t += hn::Lanes(u)) {
      const auto words = hn::LoadU(u, panels + (t / kPanel * (w.depth / 2) + i) * kPanel + t % kPanel);
      uint16_t* to = w.k_columns + 2 * i * M::kChunk + t;
      store_low_halves(hn::And(words, hn::Set(u, 0xFFFF)), to);
      store_low_halves(hn::ShiftRight<16>(words), to + M::kChunk);
    }
  }
}

inline void split_columns(const Work<Float32Mode>& w) {
  using M = Float32Mode;
  for (size_t i = 0; i < w.K; ++i) {
    for (size_t t = 0; t < M::kChunk; t += kPanel) {
      std::memcpy(w.k_columns + i * M::kChunk + t, w.k_panels + (t / kPanel * w.depth + i) * kPanel,
                  kPanel * sizeof(float));
    }
  }
}

template <class M>
void multiply_keys(const Work<M>& w, const typename M::Element* rows, float* c) {
  Product<typename M::Element> p;
  p.rows = M::kStrip;
  p.a_stride = w.depth;
  p.b_stride = w.depth * kPanel;
  p.c_stride = M::kChunk * kPanel;
  for (size_t token = 0; token < M::kChunk; token += M::kStrip) {
    set_terms<M::kKeys, M::kKeys>(p, w.depth, rows + token * w.depth, w.keys_size(), w.k_panels, w.keys_size());
    p.panels = (token + M::kStrip) / kPanel;
    p.c = c + token * kPanel;
    run(w, p);
  }
}

template <class M>
void stage_keys(const ChunkGatedDeltaRuleArgs& args, int64_t key_head, int64_t token, size_t count, Work<M>& w) {
  constexpr size_t kElementsPerWord = sizeof(uint32_t) / sizeof(typename M::Element);
  stage_rows(args.k, key_head, token, count, w, w.k_rows);
  stage_rows(args.q, key_head, token, count, w, w.q_rows);
  const size_t words = w.depth / kElementsPerWord;
  for (size_t part = 0; part < M::kKeys; ++part) {
    for (size_t t = 0; t < M::kChunk; t += kPanel) {
      transpose(w.k_rows + part * w.keys_size() + t * w.depth, kPanel, words, words,
                w.k_panels + part * w.keys_size() + t * w.depth, kPanel);
    }
  }
  split_columns(w);
  multiply_keys(w, w.k_rows, w.kk);
  multiply_keys(w, w.q_rows, w.qk);
  find_scales(args.normalise_qk, w);
}

}  // namespace HWY_NAMESPACE
}  // namespace xgdn::kernel::cpu
HWY_AFTER_NAMESPACE();

#endif  // XGDN_CORE_KERNELS_CPU_CHUNK_KEYS_INL_H_
