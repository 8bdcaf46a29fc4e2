// SPDX-License-Identifier: Apache-2.0
// k_cache[rows[t]] = k[t], v_cache[rows[t]] = v[t].
//
// Rows of the tokens' dtype: one thread copies the widest piece that all addresses are multiples of. int8: one warp
// writes a row. Rounding: codes are 127 / max |x| times the f32 value of x, to nearest even, behind them the scale
// max |x| / 127. Where max |x| is below 2^-100 all is zero; a row that has an infinity or a NaN has the scale NaN.
#include "core/kernels/cuda/store_kv.h"

#include <cstdint>
#include <cstring>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/launch.h"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;

// Strides and D are in pieces; blockIdx.y chooses between keys and values.
template <class Piece>
__global__ void copy_rows(StoreKvArgs args, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  let_next_kernel_launch();
  const int64_t width = args.HKV * args.D;
  const int64_t token = i / width;
  const int32_t row = i < count ? args.rows[token] : -1;
  wait_for_kernel_before();
  if (row < 0) return;
  const int64_t column = i % width;
  const InRows& from = blockIdx.y == 0 ? args.k : args.v;
  auto* to = static_cast<Piece*>(blockIdx.y == 0 ? args.k_cache : args.v_cache);
  to[row * width + column] = row_of<Piece>(from, token, column / args.D)[column % args.D];
}

template <class Element>
__global__ void store_codes(StoreKvArgs args, int64_t count) {
  constexpr float kMost = 127.0f;
  constexpr float kSmallest = 0x1p-100f;  // below, the reciprocal leaves f32
  constexpr uint32_t kInfinity = 0x7F800000;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  let_next_kernel_launch();
  const int lane = threadIdx.x % kLanes;
  const int64_t token = i / args.HKV;
  const int64_t head = i % args.HKV;
  const int32_t row = i < count ? args.rows[token] : -1;
  wait_for_kernel_before();
  if (row < 0) return;
  const Element* x = row_of<Element>(blockIdx.y == 0 ? args.k : args.v, token, head);
  char* to = static_cast<char*>(blockIdx.y == 0 ? args.k_cache : args.v_cache) +
             (row * args.HKV + head) * (args.D + static_cast<int64_t>(sizeof(float)));

  uint32_t bits = 0;  // of magnitudes: they order as the magnitudes do, and NaN above all
  for (int64_t j = lane; j < args.D; j += kLanes) bits = max(bits, __float_as_uint(fabsf(widened(x[j]))));
  bits = __reduce_max_sync(~0u, bits);
  const float largest = __uint_as_float(bits);
  const bool is_finite = bits < kInfinity;
  const bool has_codes = is_finite && largest >= kSmallest;
  const float inverse = has_codes ? __fdiv_rn(kMost, largest) : 0.0f;
  for (int64_t j = lane; j < args.D; j += kLanes) {
    const int code = has_codes ? __float2int_rn(widened(x[j]) * inverse) : 0;
    reinterpret_cast<int8_t*>(to)[j] = static_cast<int8_t>(code);
  }
  if (lane == 0) {
    const float scale = !is_finite ? __uint_as_float(0x7FC00000) : has_codes ? __fdiv_rn(largest, kMost) : 0.0f;
    *reinterpret_cast<float*>(to + args.D) = scale;
  }
}

// The largest power of two, at most 16, of which all byte addresses and distances of rows are multiples.
int64_t piece_size(const StoreKvArgs& args) {
  const int64_t size = size_of(args.k.dtype);
  uint64_t bits = 16 | static_cast<uint64_t>(args.D * size);
  for (const InRows* rows : {&args.k, &args.v}) {
    bits |= reinterpret_cast<uintptr_t>(rows->data) | static_cast<uint64_t>(rows->token_stride * size) |
            static_cast<uint64_t>(rows->head_stride * size);
  }
  bits |= reinterpret_cast<uintptr_t>(args.k_cache) | reinterpret_cast<uintptr_t>(args.v_cache);
  return static_cast<int64_t>(bits & (~bits + 1));
}

template <class Piece>
void launch_copy(StoreKvArgs args, cudaStream_t stream) {
  const auto pieces = [size = size_of(args.k.dtype)](int64_t elements) {
    return elements * size / static_cast<int64_t>(sizeof(Piece));
  };
  args.D = pieces(args.D);
  for (InRows* rows : {&args.k, &args.v}) {
    rows->token_stride = pieces(rows->token_stride);
    rows->head_stride = pieces(rows->head_stride);
  }
  const int64_t count = args.T * args.HKV * args.D;
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads), 2);
  launch_overlapping(copy_rows<Piece>, grid, kThreads, /*shared_bytes=*/0, /*cluster=*/1, stream, args, count);
}

void launch_codes(const StoreKvArgs& args, cudaStream_t stream) {
  constexpr int kWarps = kThreads / kLanes;
  const int64_t count = args.T * args.HKV;
  const dim3 grid(static_cast<unsigned>((count + kWarps - 1) / kWarps), 2);
  with_element(args.k.dtype, [&](auto element) {
    launch_overlapping(store_codes<decltype(element)>, grid, kThreads, /*shared_bytes=*/0, /*cluster=*/1, stream, args,
                       count);
  });
}

}  // namespace

void store_kv(const StoreKvArgs& args, cudaStream_t stream) {
  if (args.T * args.HKV * args.D == 0) return;
  if (args.are_int8) {
    launch_codes(args, stream);
  } else {
    switch (piece_size(args)) {
      case 16:
        launch_copy<uint4>(args, stream);
        break;
      case 8:
        launch_copy<uint2>(args, stream);
        break;
      case 4:
        launch_copy<uint32_t>(args, stream);
        break;
      default:
        launch_copy<uint16_t>(args, stream);
    }
  }
  check_launch("store_kv");
}

}  // namespace xgdn::kernel::cuda
