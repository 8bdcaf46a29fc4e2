// SPDX-License-Identifier: Apache-2.0
// What a block computes of a verification of at most kTokens tokens a sequence, none of which is committed.
//
// The window goes on behind row C - 1, where a fold comes, be it of the ring's tokens or between two of the call's: the
// tokens behind it begin a window of their own at row C. So all that the block's warps have in common, keys and
// weights, is there before a row of S is read. Then each warp takes its rows by itself, in passes: its part of S is
// filled again as soon as it has been read. Sums are in the order of replay_rows.cuh.
#pragma once

#include "core/kernels/cuda/replay_rows.cuh"

namespace xgdn::kernel::cuda {

/// As ReplayPlan. kPasses: the times that a warp fills its part of S.
template <class InOfPlan, int kRowsOfPlan, int kTokensOfPlan, int kCOfPlan, int kBlocksOfPlan, int kPassesOfPlan>
struct VerificationPlan : ReplayPlan<InOfPlan, kRowsOfPlan, kTokensOfPlan, kCOfPlan, kBlocksOfPlan> {
  static constexpr int kPasses = kPassesOfPlan;
  static constexpr int kNextRows = 2 * kTokensOfPlan;  // drafts that were accepted, and the call's tokens
};

template <class State, int kDim, class Plan>
class VerificationBlock : public ReplayBlock<State, kDim, Plan> {
  using Base = ReplayBlock<State, kDim, Plan>;
  static constexpr int kRows = Plan::kRows, kTokens = Plan::kTokens, kPasses = Plan::kPasses, kC = Plan::kC;
  static constexpr int kFew = kTokens / 2;
  static constexpr int kWarpRows = Base::Checkpoint::kCount;
  // With passes the code of a product is not in the instruction cache yet when its turn comes: it is kept short.
  static constexpr int kUnrolled = kPasses > 1 ? 1 : Base::Layout::kPackets;

 public:
  using typename Base::RawTokens;
  static constexpr int kBlockRows = kPasses * Base::kBlockRows;

  using Base::Base;

  /// Of shared memory.
  static size_t bytes(int64_t C) { return Base::bytes(C) + sizeof(float) * kTokens * kBlockRows; }

  /// Zeros, as the outputs of a sequence without a state.
  __device__ void clear_outputs(const ReplaySequence& s) {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      this->take_rows((blockIdx.x * kPasses + pass) * Base::kBlockRows);
      this->fill_outputs(s.begin, s.len, 0.0f);
    }
  }

  /// Takes the warp's rows of a pass.
  __device__ void take_pass(int pass) {
    this->take_rows(first_row_of(pass));
  }
  /// Starts to copy their S, whose place all lanes have read.
  __device__ void copy_pass(const ReplaySequence& s, int pass) {
    this->turn_ = pass;
    if (s.has_initial_state) {
      const int row = first_row_of(pass) + this->warp_ * kWarpRows;
      this->checkpoint_.copy(0, this->rows_in(s.read, row), this->V_ - row);
    } else {
      this->clear_checkpoint();
    }
  }
  /// Starts to bring S and u of a pass to the second-level cache.
  __device__ void prefetch_pass(const ReplaySequence& s, int pass) const {
    const int lane = threadIdx.x % 32, row = first_row_of(pass) + this->warp_ * kWarpRows;
    const int count = min(kWarpRows, this->V_ - row);
    if (count <= 0 || !s.has_initial_state) return;
    if (lane == 0) {
      prefetch_row(this->rows_in(s.read, row), static_cast<uint32_t>(count * kDim * static_cast<int>(sizeof(State))));
    }
    if (lane < s.in_ring) {
      prefetch_line(this->a_.ring.updates(s.ring_read, this->head_, this->V_) + static_cast<int64_t>(lane) * this->V_ +
                    row);
    }
  }
  /// Starts to copy keys and gates of the ring, and the warp's rows of u.
  __device__ void copy_keys(const ReplaySequence& s) const {
    Base::copy_keys(s.ring_read, 0, s.in_ring);
    if (this->warp_ == Base::kGateWarp) this->copy_gates(s.ring_read, 0, s.in_ring);
  }
  __device__ void copy_updates(const ReplaySequence& s) const {
    Base::template copy_updates<kWarpRows>(s.ring_read, 0, s.in_ring, this->warp_ * kWarpRows);
    commit_copies();
  }
  /// v of all passes, on its way.
  struct RawValues {
    RawScalar x[kPasses][kTokens];
  };
  /// For s.len > 0; the rows of the first pass are taken then.
  __device__ void load_values(const ReplaySequence& s, RawValues& raw) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      take_pass(pass);
      Base::load_values(s, 0, raw.x[pass]);
    }
    take_pass(0);
  }
  __device__ void stage_values(const RawValues& raw) const {
    if (this->lane_ >= kRows) return;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) value(pass, i) = raw.x[pass][i].widened(Base::input_type(this->a_.v));
    }
  }
  /// The weights of the windows' u in u and o of the tokens, which have been staged. A barrier before it, and behind. A
  /// group of lanes has a token, a warp some of the keys.
  __device__ void weigh(int count) const {
    static_assert(kTokens == Base::kGroups && kC % kReplayWarps == 0);
    constexpr int kKeys = kC / kReplayWarps;  // of a warp at once
    constexpr int kSums = 2 * kKeys;
    static_assert(kSums <= Base::kLanes);
    const int token = this->group_ % kTokens, lane = this->lane_, last = this->length_ + count - 1;
    const int begin = this->window_of(token), end = this->length_ + token;
    typename Base::Row k, q;
    k.read(this->window_keys() + end * kDim, lane);
    q.read(this->queries() + token * kDim, lane);
#pragma unroll 1
    for (int first = this->window_of(0) + this->warp_; first <= last; first += kC) {
      const int own = first + lane / 2 * kReplayWarps;  // the key whose product with k or q the lane gets
      const bool has_product = lane < kSums && token < count && own >= begin && own <= end;
      const float decay = has_product ? this->to_u()[own].x[token] : 0.0f;  // which the weight replaces
      float sums[kSums] = {};
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (first + i * kReplayWarps > last) break;
        const float* const row = this->window_keys() + (first + i * kReplayWarps) * kDim;
#pragma unroll
        for (int j = 0; j < Base::Layout::kPackets; ++j) {
          typename Base::Packet key;
          Base::Layout::read(row, j, lane, key.x);
          key.add_products(k.x[j], sums[2 * i]);
          key.add_products(q.x[j], sums[2 * i + 1]);
        }
      }
      const float product = sums_over_lanes<Base::kLanes>(sums, lane);
      __syncwarp();
      if (has_product) (lane % 2 == 0 ? this->to_u() : this->to_o())[own].x[token] = decay * product;
    }
  }

  /// The tokens on the warp's rows; next() is called as soon as their S is not needed any more.
  template <class Next>
  __device__ void step(const ReplaySequence& s, int pass, const Next& next) {
    const int num_first = min(max(kC - s.in_ring, 0), s.len);  // ahead of a fold
    const bool folds = s.in_ring >= kC || num_first < s.len;
    bool has_folded = false;
    this->wait_for_checkpoint();
#pragma unroll 1
    for (int first = 0, end = num_first;; first = num_first, end = s.len) {
      float products[kTokens] = {};
      if (first < end) multiply(first, end, products);
      if (!has_folded) {
        wait_copies<0>();
        __syncwarp();  // u
        write_old(s);
      }
      if (folds == has_folded) next();
      if (first < end) {
        this->add_tokens(
            s, 0, this->window_of(first), first, end, [&](int i) { return value(pass, i); }, products);
      }
      if (folds == has_folded) return;
      this->fold_warp(kC, s.is_written && s.folded > 0 ? s.write : -1);
      fence_shared_memory();
      has_folded = true;
    }
  }

  /// Keys and gates that the written ring lacks.
  __device__ void write_keys(const ReplaySequence& s) const {
    const int first = s.first_written();
    Base::write_keys(s, first, s.end() - first);
  }

 private:
  // What tokens `first` to `end` take from S. Beside them it may be computed for others.
  __device__ void multiply(int first, int end, float (&products)[kTokens]) const {
    if (end <= kFew) {
      this->template multiply_checkpoint<0, kFew, kUnrolled>(products);
    } else if (first >= kFew) {
      this->template multiply_checkpoint<kFew, kFew, kUnrolled>(products);
    } else {
      this->template multiply_checkpoint<0, kTokens, kUnrolled>(products);
    }
  }
  // [kPasses, kTokens, rows of a pass], behind what the base has in shared memory
  __device__ float& value(int pass, int i) const {
    return this->betas()[kTokens + (pass * kTokens + i) * Base::kBlockRows + this->own_row_];
  }
  // Of the block, if the warp's rows were where they are among its rows; those of all passes lie behind each other.
  __device__ int first_row_of(int pass) const {
    return blockIdx.x * kBlockRows + (this->warp_ * (kPasses - 1) + pass) * kWarpRows;
  }
  // What was there before and is written to other slots: S, and u.
  __device__ void write_old(const ReplaySequence& s) const {
    if (!s.is_written) return;
    if (s.folded == 0 && !(s.has_initial_state && s.write == s.read)) this->store_checkpoint(s.write);
    const int first = s.first_written(), lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = first * kWarpRows + lane; i < s.in_ring * kWarpRows; i += 32) {
      const int row = this->warp_ * kWarpRows + i % kWarpRows, token = i / kWarpRows;
      if (this->first_row_ + row < this->V_) {
        this->ring_u(s, token)[row] = this->window_u()[token * Base::kBlockRows + row];
      }
    }
  }
};

}  // namespace xgdn::kernel::cuda
