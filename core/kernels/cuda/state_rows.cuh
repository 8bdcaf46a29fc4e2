// SPDX-License-Identifier: Apache-2.0
// Rows of a state over the lanes of a warp, and the delta rule on them: shared by the op and the fused decode step.
//
// A row of S, K numbers, lies over a group of kLanes lanes in packets of 16 bytes: packet j of a lane holds the columns
// from (j kLanes + lane) kPacket on, so that a load of the warp takes whole lines. q and k lie in the same way. All
// sums are f32: over a lane's columns in order, then over the lanes by halves, so a row's bits depend on nothing but
// the row.
#pragma once

#include "core/kernels/cuda/async_copy.cuh"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr float kNormEps = 1e-6f;  // of the l2norm of q and k

template <class State, int kDim>
struct RowLayout {
  static constexpr int kPacket = 16 / sizeof(State);
  static constexpr int kMostLanes = kDim / kPacket;
  static constexpr int kWanted = kDim >= 256 ? 16 : 8;
  static constexpr int kLanes = kMostLanes < kWanted ? kMostLanes : kWanted;
  static constexpr int kPackets = kDim / kLanes / kPacket;  // of a lane
  static_assert(kDim % (kLanes * kPacket) == 0 && 32 % kLanes == 0);

  __device__ static int column(int packet, int lane) { return (packet * kLanes + lane) * kPacket; }

  /// A lane's packet of a row of f32.
  __device__ static void read(const float* row, int packet, int lane, float (&x)[kPacket]) {
#pragma unroll
    for (int i = 0; i < kPacket; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + column(packet, lane) + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
};

/// A lane's elements of a row.
template <class State, int kDim>
struct LaneRow {
  using Layout = RowLayout<State, kDim>;
  float x[Layout::kPackets][Layout::kPacket];

  __device__ void read(const float* row, int lane) {  // from shared memory
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) Layout::read(row, j, lane, x[j]);
  }
  __device__ void write(float* row, int lane) const {  // as read() reads it
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; i += 4) {
        *reinterpret_cast<float4*>(row + Layout::column(j, lane) + i) =
            make_float4(x[j][i], x[j][i + 1], x[j][i + 2], x[j][i + 3]);
      }
    }
  }
  __device__ void store(State* row, int lane) const {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) store_whole(row + Layout::column(j, lane), packed(x[j]));
  }
  /// What is not read again soon should not push other things out of the cache.
  __device__ void store_once(State* row, int lane) const {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
      __stcs(reinterpret_cast<uint4*>(row + Layout::column(j, lane)), packed(x[j]));
    }
  }
  __device__ float dot(const LaneRow& y) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) sum = fmaf(x[j][i], y.x[j][i], sum);
    }
    return sum;
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) x[j][i] *= factor;
    }
  }
  /// x + factor y
  __device__ void add(float factor, const LaneRow& y) {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) x[j][i] = fmaf(factor, y.x[j][i], x[j][i]);
    }
  }
  /// The decay of x, and factor y added.
  __device__ void decay_and_add(const Decay& decay, float factor, const LaneRow& y) {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) {
        x[j][i] = fmaf(decay.kept, x[j][i], fmaf(decay.factor, x[j][i], factor * y.x[j][i]));
      }
    }
  }
};

/// A lane's elements of a row of S, of q or of k, on their way.
template <class Element, class State, int kDim>
struct RawLaneRow {
  using Layout = RowLayout<State, kDim>;
  RawPackets<Element, Layout::kPacket> x[Layout::kPackets];

  __device__ void load(const Element* row, int lane) {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) x[j].load(row + Layout::column(j, lane));
  }
  __device__ void load_once(const Element* row, int lane) {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) x[j].load_once(row + Layout::column(j, lane));
  }
  __device__ void widen(LaneRow<State, kDim>& row) const {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) x[j].widen(row.x[j]);
  }
};

/// Rows of a state on their way through shared memory, kRows of a group at once, kStages times. A thread reads what it
/// copied itself, so threads do not wait for each other. Row r of a group lies kStep rows behind row r-1.
template <class State, int kDim, int kRows, int kStages, int kThreads, int kStep>
class RowsInFlight {
 public:
  using Layout = RowLayout<State, kDim>;
  static constexpr int kPieces = kRows * Layout::kPackets;
  static constexpr int kBytes = kStages * kPieces * kThreads * 16;

  __device__ explicit RowsInFlight(uint4* shared) : mine_(shared + threadIdx.x) {}

  /// Copies the first `count` rows of those behind `rows`, where row 0 of the group begins.
  __device__ void copy(int stage, const State* rows, int lane, int count) {
    const uint32_t to = shared_address(mine_ + stage * kPieces * kThreads);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= count) continue;
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) {
        copy_async(to + (r * Layout::kPackets + j) * kThreads * 16, rows + r * kStep * kDim + Layout::column(j, lane));
      }
    }
  }
  __device__ void widen(int stage, LaneRow<State, kDim> (&s)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) {
        RawPackets<State, Layout::kPacket> raw;
        raw.set(0, mine_[(stage * kPieces + r * Layout::kPackets + j) * kThreads]);
        raw.widen(s[r].x[j]);
      }
    }
  }

 private:
  uint4* mine_;
};

/// Neighbouring rows of a state on their way through shared memory, kRows of each of a warp's groups at once, kStages
/// times; row r of a group lies kGroups rows behind row r-1. A warp copies for itself and waits for no other: each
/// thread what it reads itself, or, where kMayBeBulk and the device is a Hopper, one lane all rows in one piece.
template <class State, int kDim, int kRows, int kStages, int kWarps, bool kMayBeBulk>
class WarpRows {
 public:
  using Layout = RowLayout<State, kDim>;
  static constexpr int kGroups = 32 / Layout::kLanes;
  static constexpr int kCount = kRows * kGroups;  // of a warp
  static constexpr int kStageBytes = kWarps * kCount * kDim * static_cast<int>(sizeof(State));
  using Barriers = uint64_t[kWarps][kStages];

  /// All lanes of the warp, ahead of the first copy.
  __device__ WarpRows(uint4* shared, Barriers& barriers)
      : mine_(reinterpret_cast<State*>(shared) + threadIdx.x / 32 * kCount * kDim),
        barriers_(shared_address(barriers[threadIdx.x / 32])),
        group_(threadIdx.x % 32 / Layout::kLanes),
        lane_(threadIdx.x % Layout::kLanes) {
    if constexpr (!kIsBulk) return;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) init_barrier(barriers_ + 8 * stage, 1);
      fence_barrier_init();
    }
    __syncwarp();
  }

  /// Starts to copy the first `count` of the warp's rows, at most kCount, or none; all lanes have what was there before
  /// in registers.
  __device__ void copy(int stage, const State* rows, int count) const {
    State* const to = mine_ + stage * kStageElements;
    if constexpr (kIsBulk) {
      if (threadIdx.x % 32 != 0) return;
      if (count <= 0) return arrive_at(barriers_ + 8 * stage);
      const auto bytes = static_cast<uint32_t>(min(count, kCount) * kDim * static_cast<int>(sizeof(State)));
      arrive_and_expect(barriers_ + 8 * stage, bytes);
      copy_bulk(shared_address(to), rows, bytes, barriers_ + 8 * stage);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r * kGroups + group_ >= count) continue;
#pragma unroll
        for (int j = 0; j < Layout::kPackets; ++j) {
          const int at = (r * kGroups + group_) * kDim + Layout::column(j, lane_);
          copy_async(shared_address(to + at), rows + at);
        }
      }
      commit_copies();
    }
  }
  /// In place of a copy where there are no more, for those before it are counted.
  __device__ void copy_nothing() const {
    if constexpr (!kIsBulk) commit_copies();
  }
  /// Waits for the copy to the stage that began kStages copies ago, its `turn`th one.
  __device__ void wait(int stage, int turn) const {
    if constexpr (kIsBulk) {
      wait_at(barriers_ + 8 * stage, turn % 2);
    } else {
      wait_copies<kStages - 1>();
    }
  }
  __device__ void widen(int stage, LaneRow<State, kDim> (&s)[kRows]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) widen(stage, r, s[r]);
  }
  __device__ void widen(int stage, int r, LaneRow<State, kDim>& row) const {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) widen(stage, r, j, row.x[j]);
  }
  __device__ void widen(int stage, int r, int packet, float (&x)[Layout::kPacket]) const {
    RawPackets<State, Layout::kPacket> raw;
    raw.load(at(stage, r, packet));
    raw.widen(x);
  }
  /// In place of row r of a stage.
  __device__ void put(int stage, int r, const LaneRow<State, kDim>& row) const {
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) *reinterpret_cast<uint4*>(at(stage, r, j)) = packed(row.x[j]);
  }

 private:
#if __CUDA_ARCH__ >= 900
  static constexpr bool kIsBulk = kMayBeBulk;
#else
  static constexpr bool kIsBulk = false;
#endif
  static constexpr int kStageElements = kWarps * kCount * kDim;

  __device__ State* at(int stage, int r, int packet) const {
    return mine_ + stage * kStageElements + (r * kGroups + group_) * kDim + Layout::column(packet, lane_);
  }

  State* mine_;
  uint32_t barriers_;
  int group_, lane_;
};

/// A token's q and k as they lie in memory, and what makes them unit vectors: the products with S take the raw ones.
template <class State, int kDim>
struct TokenKeys {
  LaneRow<State, kDim> q, k;
  float q_factor, k_factor, kq;  // in every lane; kq of the vectors with their factors

  __device__ void prepare(bool normalises, float scale) {
    constexpr int kLanes = RowLayout<State, kDim>::kLanes;
    kq = sum_over_lanes<kLanes>(k.dot(q));
    q_factor = scale;
    k_factor = 1.0f;
    if (normalises) {
      q_factor = scale * rsqrtf(sum_over_lanes<kLanes>(q.dot(q)) + kNormEps);
      k_factor = rsqrtf(sum_over_lanes<kLanes>(k.dot(k)) + kNormEps);
    }
    kq *= q_factor * k_factor;
  }

  /// Whether a lane gets an element of o from step(): that of s[lane % kRows].
  template <int kRows>
  __device__ static bool is_output(int lane) {
    return lane >= kRows && lane < 2 * kRows;
  }

  /// S <- decay S + beta (v - decay S k) k^T, o = S q on kRows rows. Lane r brings the v of row r, as does every lane
  /// with that remainder by kRows.
  template <int kRows>
  __device__ float step(LaneRow<State, kDim> (&s)[kRows], const Decay& decay, float beta, float v, int lane) const {
    constexpr int kLanes = RowLayout<State, kDim>::kLanes;
    float products[2 * kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      products[r] = s[r].dot(k);
      products[kRows + r] = s[r].dot(q);
    }
    const float product = sums_over_lanes<kLanes>(products, lane);
    const float u = beta * (v - decay.of(k_factor * product));  // in lanes of S k
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      s[r].decay_and_add(decay, __shfl_sync(0xffffffffu, u, r, kLanes) * k_factor, k);
    }
    return fmaf(__shfl_sync(0xffffffffu, u, lane % kRows, kLanes), kq, decay.of(q_factor * product));
  }
};

}  // namespace xgdn::kernel::cuda
