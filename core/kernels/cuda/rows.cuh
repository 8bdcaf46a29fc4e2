// SPDX-License-Identifier: Apache-2.0
// Rows of args.h as device code reads and writes them, as f32 in registers.
//
// A load and its conversion are apart (Raw...): converting waits for the load, so whoever has several loads converts
// after the last one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// The address of a row.
__device__ inline const char* row_of(const InRows& rows, int64_t token, int64_t head) {
  return static_cast<const char*>(rows.data) +
         (token * rows.token_stride + head * rows.head_stride) * (rows.dtype == DType::kFloat32 ? 4 : 2);
}
__device__ inline char* row_of(const OutRows& rows, int64_t token, int64_t head) {
  return static_cast<char*>(rows.data) +
         (token * rows.token_stride + head * rows.head_stride) * (rows.dtype == DType::kFloat32 ? 4 : 2);
}
template <class Element>
__device__ inline const Element* row_of(const InRows& rows, int64_t token, int64_t head) {
  return static_cast<const Element*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}
template <class Element>
__device__ inline Element* row_of(const OutRows& rows, int64_t token, int64_t head) {
  return static_cast<Element*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// ---- single numbers -------------------------------------------------------------------------------------------------

/// A number of a type that is known at run time, as it lies in memory.
class RawScalar {
 public:
  __device__ void load(DType dtype, const void* row, int64_t i) {
    bits_ = dtype == DType::kFloat32 ? static_cast<const uint32_t*>(row)[i] : static_cast<const uint16_t*>(row)[i];
  }
  __device__ float widened(DType dtype) const {
    switch (dtype) {
      case DType::kBFloat16:
        return __uint_as_float(bits_ << 16);
      case DType::kFloat16:
        return __half2float(__ushort_as_half(static_cast<unsigned short>(bits_)));
      default:
        return __uint_as_float(bits_);
    }
  }

 private:
  uint32_t bits_;
};

__device__ inline float load_scalar(DType dtype, const void* row, int64_t i) {
  RawScalar raw;
  raw.load(dtype, row, i);
  return raw.widened(dtype);
}

__device__ inline void store_scalar(DType dtype, void* row, int64_t i, float x) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(row)[i] = __float2bfloat16_rn(x);
      break;
    case DType::kFloat16:
      static_cast<__half*>(row)[i] = __float2half_rn(x);
      break;
    default:
      static_cast<float*>(row)[i] = x;
  }
}

__device__ inline float widened(float x) {
  return x;
}
__device__ inline float widened(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float widened(__half x) {
  return __half2float(x);
}

/// x rounded to the type, to nearest even.
template <class Element>
__device__ inline Element narrowed(float x) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

/// x as the type holds it.
template <class Element>
__device__ inline float rounded(float x) {
  return widened(narrowed<Element>(x));
}

// ---- neighbours -----------------------------------------------------------------------------------------------------

/// kCount neighbours as they lie in memory: packets of up to 16 bytes, to which they are aligned.
template <class Element, int kCount>
class RawPackets {
 public:
  __device__ void load(const Element* from) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) set(i, reinterpret_cast<const uint4*>(from)[i / 4]);
    } else {
      static_assert(kWords == 2);
      const uint2 packet = *reinterpret_cast<const uint2*>(from);
      words_[0] = packet.x, words_[1] = packet.y;
    }
  }
  /// What is read once should not push other things out of the cache.
  __device__ void load_once(const Element* from) {
    static_assert(kWords % 4 == 0);
#pragma unroll
    for (int i = 0; i < kWords; i += 4) set(i, __ldcs(reinterpret_cast<const uint4*>(from) + i / 4));
  }
  __device__ void widen(float (&x)[kCount]) const {
    widen_as<Element>(x);
  }
  /// As if the elements were of another type of the same size.
  template <class Other>
  __device__ void widen_as(float (&x)[kCount]) const {
    if constexpr (std::is_same_v<Other, float>) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = __uint_as_float(words_[i]);
    } else if constexpr (std::is_same_v<Other, __nv_bfloat16>) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        x[2 * i] = __uint_as_float(words_[i] << 16);
        x[2 * i + 1] = __uint_as_float(words_[i] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words_[i] & 0xffffu)));
        x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words_[i] >> 16)));
      }
    }
  }
  __device__ void set_bits(int word, uint32_t bits) {
    words_[word] = bits;
  }

  /// Words `first` to `first` + 3.
  __device__ void set(int first, uint4 packet) {
    words_[first] = packet.x, words_[first + 1] = packet.y, words_[first + 2] = packet.z, words_[first + 3] = packet.w;
  }

 private:
  static constexpr int kWords = kCount * static_cast<int>(sizeof(Element)) / 4;

  uint32_t words_[kWords];
};

/// kCount neighbours of a row of a type that is known at run time, as they lie in memory.
template <int kCount>
class RawElements {
 public:
  /// `is_aligned`: whether they may be read in packets.
  __device__ void load(DType dtype, bool is_aligned, const void* row, int64_t first) {
    if (dtype == DType::kFloat32) {
      const float* const from = static_cast<const float*>(row) + first;
      if (is_aligned) return wide_.load(from);
#pragma unroll
      for (int i = 0; i < kCount; ++i) wide_.set_bits(i, __float_as_uint(from[i]));
    } else {
      const __nv_bfloat16* const from = static_cast<const __nv_bfloat16*>(row) + first;
      if (is_aligned) return narrow_.load(from);
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        narrow_.set_bits(i / 2, __bfloat16_as_ushort(from[i]) | static_cast<uint32_t>(__bfloat16_as_ushort(from[i + 1]))
                                                                    << 16);
      }
    }
  }
  __device__ void widen(DType dtype, float (&x)[kCount]) const {
    switch (dtype) {
      case DType::kBFloat16:
        return narrow_.widen(x);
      case DType::kFloat16:
        return narrow_.template widen_as<__half>(x);
      default:
        wide_.widen(x);
    }
  }

 private:
  union {
    RawPackets<float, kCount> wide_;
    RawPackets<__nv_bfloat16, kCount> narrow_;  // bf16 or f16
  };
};

/// A packet of 16 bytes: x as f32, or rounded to bf16.
__device__ inline uint4 packed(const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ inline uint4 packed(const float (&x)[8]) {
  uint4 packet;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packet);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return packet;
}

/// Stores a packet in one piece, which an assignment may take apart.
__device__ inline void store_whole(void* to, uint4 packet) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(packet.x),
               "r"(packet.y), "r"(packet.z), "r"(packet.w)
               : "memory");
}

// ---- sums over lanes ------------------------------------------------------------------------------------------------

/// The sum over kLanes neighbouring lanes, in each of them: lanes kLanes/2 apart first.
template <int kLanes>
__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

/// The same sums of several numbers at once, with the same bits: a lane gets that of x[lane % kCount]. kCount is a
/// power of two, at most kLanes. Each step halves what a lane still adds.
template <int kLanes, int kCount>
__device__ inline float sums_over_lanes(float (&x)[kCount], int lane) {
  static_assert(kCount <= kLanes);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    if (step >= kCount) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
    } else {
      const bool is_upper = (lane & step) != 0;
#pragma unroll
      for (int i = 0; i < step; ++i) {
        const float kept = is_upper ? x[i + step] : x[i];
        const float given = is_upper ? x[i] : x[i + step];
        x[i] = kept + __shfl_xor_sync(0xffffffffu, given, step);
      }
    }
  }
  return x[0];
}

}  // namespace xgdn::kernel::cuda
