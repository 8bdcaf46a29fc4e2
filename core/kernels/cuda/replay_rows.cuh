// SPDX-License-Identifier: Apache-2.0
// What a block computes of the gated delta rule on checkpoints and rings; the maths is that of
// docs/gated_delta_rule.md, "Replay states".
//
// A block takes rows of one head of one sequence, from the sequence's first token to the last. In shared memory it has
// those rows of the checkpoint S, and the window: the tokens since the checkpoint, up to C of them. The tokens of a
// call join the window in batches; once it is full it is folded into S, if more tokens follow or all are committed.
//
//   batch:  keys, queries and gates of its tokens -> window, decays up to them | barrier |
//           products with the window's keys (a group of lanes a key), and with S (a group a row) | barrier |
//           per row and token: u and o, summed over the window
//
// A row of S lies over lanes as in state_rows.cuh; of the two numbers that a token takes from it, S k and S q, each
// goes to a lane of its own, which then computes u or o of that row.
//
// Rounding: all is f32 but sums of gates, which are double, and a bf16 S, which is rounded by each fold. Where the
// decay of a fold is near one the fold is S + (S (D - 1) + sum), rounded once.
// Order of sums: over K as in state_rows.cuh; then the checkpoint's part, the window's tokens in ascending order, the
// token itself. No sum depends on how a sequence is cut into calls and batches, on the grid, or on other sequences.
// Where a fold that follows a committed token is not finite in a block's rows, the block's outputs of that token are
// NaN.
#pragma once

#include <algorithm>

#include "core/kernels/cuda/dependent_launch.cuh"
#include "core/kernels/cuda/divisor.cuh"
#include "core/kernels/cuda/element_types.h"
#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/replay_sequence.cuh"
#include "core/kernels/cuda/state_rows.cuh"
#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

inline constexpr int kReplayWarps = 4;
inline constexpr int kReplayThreads = kReplayWarps * 32;

/// Decays from the rows of a window to one of them, `last`. A lane has two rows, whose gates are summed in double from
/// the last row backwards, by halves: what a sum has depends on its rows alone. No difference is taken: of sums over
/// the whole window it would be all noise behind a gate that wipes the state.
struct WindowDecays {
  double of_all;    // the logarithm of the decay of S
  float even, odd;  // from rows 2 lane and 2 lane + 1 on

  /// For each `lanes` neighbouring lanes a `last` of their own, below 2 lanes; a power of two.
  __device__ WindowDecays(const float* gates, int last, int lanes) {
    const int lane = threadIdx.x % lanes;
    const auto gate = [&](int row) { return row <= last ? static_cast<double>(gates[row]) : 0.0; };
    const double odd_gate = gate(2 * lane + 1);
    double sum = gate(2 * lane) + odd_gate;  // of the lane's rows and those behind
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      if (step >= lanes) break;
      const double behind = __shfl_down_sync(0xffffffffu, sum, step);
      sum += lane + step < lanes ? behind : 0.0;
    }
    of_all = __shfl_sync(0xffffffffu, sum, 0, lanes);
    const double next = __shfl_down_sync(0xffffffffu, sum, 1);
    const double behind = lane == lanes - 1 ? 0.0 : next;
    odd = expf(static_cast<float>(behind));
    even = expf(static_cast<float>(behind + odd_gate));
  }
  /// That of S, as if it were computed in double: what it lacks would come back at every fold.
  __device__ Decay of_state() const {
    const double log = of_all < -1e4 ? -1e4 : of_all;  // both are none; an infinite one has no rest
    const auto nearest = static_cast<float>(log);
    Decay decay(nearest);
    const auto rest = static_cast<float>(log - static_cast<double>(nearest));
    decay.factor = fmaf(rest, decay.kept + decay.factor, decay.factor);
    return decay;
  }
};

/// What a kernel is made for: the element of q, k, v and out, or void where it is known at run time; rows of a group of
/// lanes; tokens of a batch; C, or 0 where it is known at run time; blocks that a multiprocessor's registers hold.
template <class InOfPlan, int kRowsOfPlan, int kTokensOfPlan, int kCOfPlan, int kBlocksOfPlan>
struct ReplayPlan {
  using In = InOfPlan;
  static constexpr int kRows = kRowsOfPlan, kTokens = kTokensOfPlan, kC = kCOfPlan, kBlocks = kBlocksOfPlan;
  static constexpr int kNextRows = 0;  // of the window behind C: the window after a fold
};

/// Rows of a head of a sequence, and the window, which lies in shared memory behind S.
template <class State, int kDim, class Plan>
class ReplayBlock {
  static constexpr int kRows = Plan::kRows, kTokens = Plan::kTokens, kNextRows = Plan::kNextRows;

 public:
  using Layout = RowLayout<State, kDim>;
  static constexpr int kLanes = Layout::kLanes;
  static constexpr int kGroups = 32 / kLanes;  // of a warp
  static constexpr int kBlockRows = kReplayWarps * kGroups * kRows;
  static constexpr int kBlockGroups = kReplayWarps * kGroups;
  static_assert(2 * kRows <= kLanes && 2 * kTokens <= kLanes && 2 * kTokens <= kBlockGroups);
  using Checkpoint = WarpRows<State, kDim, kRows, 1, kReplayWarps, true>;
  using Row = LaneRow<State, kDim>;

  /// What a batch needs, on its way.
  struct RawTokens {
    RawElements<Layout::kPacket> key[Layout::kPackets];  // or query
    RawScalar v[kTokens], gate, beta;
  };

  /// Of shared memory.
  static size_t bytes(int64_t C) {
    const int64_t rows = C + kNextRows;
    return Checkpoint::kStageBytes +
           sizeof(float) * (rows * (kDim + 1) + (rows - 1) * kBlockRows + kQueries + kTokens * (2 * rows + 2));
  }

  __device__ ReplayBlock(const ReplayGatedDeltaRuleArgs& args, Divisor heads_of_key, uint4* shared,
                         typename Checkpoint::Barriers& barriers)
      : a_(args),
        V_(static_cast<int>(args.V)),
        head_(blockIdx.y),
        key_head_(heads_of_key.quotient(head_)),
        is_of_key_(key_head_ * static_cast<int>(heads_of_key.value) == head_),
        warp_(__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0)),
        lane_(threadIdx.x % kLanes),
        group_(threadIdx.x / kLanes),
        shared_(reinterpret_cast<float*>(shared)),
        checkpoint_(shared, barriers) {
    take_rows(blockIdx.x * kBlockRows);
    is_output_ = lane_ % (2 * kRows) >= kRows;
  }

  /// x, as the block's outputs of tokens `begin` to `begin + len`.
  __device__ void fill_outputs(int64_t begin, int len, float x) const {
#pragma unroll 1
    for (int t = 0; t < len; ++t) {
#pragma unroll 1
      for (int row = threadIdx.x; row < min(kBlockRows, V_ - first_row_); row += kReplayThreads) {
        store_scalar(a_.out.dtype, row_of(a_.out, begin + t, head_), first_row_ + row, x);
      }
    }
  }

  // ---- copies to shared memory: S, which wait_for_checkpoint() awaits, and the ring, wait_for_copies() ----

  __device__ void copy_checkpoint(int32_t slot) {
    const int first = warp_ * Checkpoint::kCount;
    checkpoint_.copy(0, rows_in(slot, first_row_ + first), V_ - first_row_ - first);
  }
  __device__ void clear_checkpoint() {
    checkpoint_.copy(0, nullptr, 0);
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) checkpoint_.put(0, r, Row{});
  }
  /// Rows `first` to `first + count` of a ring, at most C of them, to the begin of the window: u and gates by a warp
  /// each.
  __device__ void copy_ring(int32_t slot, int first, int count) {
    copy_keys(slot, first, count);
    if (warp_ == kUpdateWarp) {
      copy_updates<kBlockRows>(slot, first, count, 0);
    } else if (warp_ == kGateWarp) {
      copy_gates(slot, first, count);
    }
    commit_copies();
  }
  __device__ void wait_for_checkpoint() const {
    checkpoint_.wait(0, turn_);
  }
  __device__ void wait_for_copies() const {
    wait_copies<0>();
    __syncthreads();
  }

  // ---- tokens ----

  /// Starts to bring what load_tokens() reads to the second-level cache.
  __device__ void prefetch_tokens(const ReplaySequence& s, int t) const {
    if (t >= s.len) return;
    const int64_t token = s.begin + min(t + lane_ % kTokens, s.len - 1);
    if (stages_keys()) {
      const InRows& rows = staged_rows();
      const char* const row = input_row(rows, s.begin + min(t + staged_token(), s.len - 1), key_head_);
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) prefetch_line(row + Layout::column(j, lane_) * element_size(rows));
    }
    prefetch_line(input_row(a_.v, token, head_) + first_row_ * element_size(a_.v));
    prefetch_line(row_of(a_.beta, token, head_));
    prefetch_line(row_of(a_.g, token, head_));
  }
  /// Loads what a batch from token t < len of the sequence on needs: a row of k or q for a group, gates for a warp.
  __device__ void load_tokens(const ReplaySequence& s, int t, RawTokens& raw) const {
    const int last = s.len - 1 - t;
    if (stages_keys()) {
      const InRows& rows = staged_rows();
      const void* const row = input_row(rows, s.begin + t + min(staged_token(), last), key_head_);
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) raw.key[j].load(input_type(rows), true, row, Layout::column(j, lane_));
    }
    if (warp_ == kGateWarp) {
      const int64_t token = s.begin + t + min(min(static_cast<int>(threadIdx.x) % 32, kTokens - 1), last);
      raw.gate.load(a_.g.dtype, row_of(a_.g, token, head_), 0);
      raw.beta.load(a_.beta.dtype, row_of(a_.beta, token, head_), 0);
    }
    load_values(s, t, raw.v);
  }
  __device__ void load_values(const ReplaySequence& s, int t, RawScalar (&values)[kTokens]) const {
    const int last = s.len - 1 - t;
    const char* const v = input_row(a_.v, s.begin + t, head_);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      values[i].load(input_type(a_.v), v + min(i, last) * token_bytes(a_.v), min(first_row_ + own_row_, V_ - 1));
    }
  }
  /// Appends the first `count` of them to the window: a group makes the key of a token, the next one its query, a warp
  /// the decays up to all tokens.
  __device__ void stage_tokens(const RawTokens& raw, int count) {
    if (stages_keys()) {
      Row x;
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) raw.key[j].widen(input_type(a_.k), x.x[j]);
      normalise(x);
      const int i = group_ / 2;
      if (i < count) x.write(group_ % 2 == 0 ? window_keys() + (length_ + i) * kDim : queries() + i * kDim, lane_);
    }
    if (warp_ == kGateWarp) {
      const int lane = threadIdx.x % 32, lanes = C() / 2;
      wait_copies<0>();  // of the window's gates, which this warp has copied
      __syncwarp();
      if (lane < count) {
        window_gates()[length_ + lane] = raw.gate.widened(a_.g.dtype);
        betas()[lane] = raw.beta.widened(a_.beta.dtype);
      }
      __syncwarp();
#pragma unroll 1
      for (int first = 0; first < count; first += 32 / lanes) {
        const int t = first + lane / lanes, pair = lane % lanes;
        const int begin = window_of(min(t, count - 1)), last = length_ + min(t, count - 1) - begin;
        const WindowDecays decays(window_gates() + begin, last, lanes);
        if (t >= count) continue;
        if (2 * pair <= last) to_u()[begin + 2 * pair].x[t] = decays.even;
        if (2 * pair < last) to_u()[begin + 2 * pair + 1].x[t] = decays.odd;
        if (pair == 0) of_checkpoint()[t] = expf(static_cast<float>(decays.of_all));
      }
    }
  }

  /// What `count` > 0 staged tokens take from the window's keys and, decayed, from S. A barrier before it, and behind.
  __device__ void multiply(int count, float (&products)[kTokens]) {
    multiply_window(count);
    wait_for_checkpoint();
    multiply_checkpoint<0, kTokens>(products);
  }
  /// u and o of those tokens, from token t of the sequence on. Rows of u stay with the lanes of a warp.
  __device__ void add_tokens(const ReplaySequence& s, const RawTokens& raw, int t, int count, float (&sums)[kTokens]) {
    add_tokens(
        s, t, 0, 0, count, [&](int i) { return raw.v[i].widened(input_type(a_.v)); }, sums);
    length_ += count;
  }

  // ---- the fold ----

  /// S <- D S + sum_i D_i u_i k_i^T after the window's first `count` > 0 tokens; to slot `to` as well, unless negative.
  /// Ends with a barrier. Returns whether the block's rows of it are finite.
  __device__ bool fold(int count, int32_t to) {
    const bool all_finite = fold_warp(count, to);
    base_ += count;
    length_ = 0;
    return __syncthreads_and(all_finite) != 0;
  }

  // ---- what is written beside outputs, u and folds ----

  /// The checkpoint as it was read.
  __device__ void store_checkpoint(int32_t to) const {
    wait_for_checkpoint();
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      Row s;
      checkpoint_.widen(0, r, s);
      store(to, r, s);
    }
  }
  /// u of rows that were in the ring, where the written ring lacks them.
  __device__ void write_old_updates(const ReplaySequence& s) const {
    if (length_ == 0 || !is_kept(s, 0)) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < length_ * kBlockRows; i += kReplayThreads) {
      const int row = i % kBlockRows;
      if (first_row_ + row < V_) ring_u(s, i / kBlockRows)[row] = window_u()[i];
    }
  }
  /// Keys and gates of `count` rows of the window from `first` on, of which one block of a head or key head has charge.
  __device__ void write_keys(const ReplaySequence& s, int first, int count) const {
    if (count == 0 || blockIdx.x != 0 || s.overwrites() || !is_kept(s, first)) return;
    const int to = ring_row(s, first);
    float* const gates = a_.ring.gates(s.ring_write, head_) + to;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kReplayThreads) gates[i] = window_gates()[first + i];
    if (!is_of_key_) return;
    auto* const keys = reinterpret_cast<float4*>(a_.ring.keys(s.ring_write, key_head_, kDim) + to * kDim);
    const auto* const from = reinterpret_cast<const float4*>(window_keys() + first * kDim);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kDim / 4; i += kReplayThreads) keys[i] = from[i];
  }
  /// Those of all rows and heads that the written ring has, by the block that has read the old ring last.
  __device__ void write_all_keys(const ReplaySequence& s) const {
    const int H = static_cast<int>(a_.H), HV = static_cast<int>(a_.HV);
    const int num_old = max(0, s.in_ring - s.folded), num_new = s.end() - s.folded - num_old;
#pragma unroll 1
    for (int i = threadIdx.x; i < HV * num_old; i += kReplayThreads) {
      const int head = i / num_old, row = i % num_old;
      a_.ring.gates(s.ring_write, head)[row] = a_.ring.gates(s.ring_read, head)[s.folded + row];
    }
    const int head_packets = num_old * kDim / 4;
    const auto packet_of = [&](int32_t slot, int row, int i) {
      float* const keys = a_.ring.keys(slot, i / head_packets, kDim) + row * kDim;
      return reinterpret_cast<float4*>(keys) + i % head_packets;
    };
    constexpr int kAtOnce = 4;  // loads under way
#pragma unroll 1
    for (int first = threadIdx.x; first < H * head_packets; first += kAtOnce * kReplayThreads) {
      float4 packets[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        packets[j] = *packet_of(s.ring_read, s.folded, min(first + j * kReplayThreads, H * head_packets - 1));
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = first + j * kReplayThreads;
        if (i < H * head_packets) *packet_of(s.ring_write, 0, i) = packets[j];
      }
    }
    __syncthreads();  // new rows may go where old ones were
#pragma unroll 1
    for (int i = threadIdx.x; i < HV * num_new; i += kReplayThreads) {
      const int head = i / num_new, row = num_old + i % num_new;
      a_.ring.gates(s.ring_write, head)[row] =
          load_scalar(a_.g.dtype, row_of(a_.g, s.begin + s.folded + row - s.in_ring, head), 0);
    }
#pragma unroll 1
    for (int first = 0; first < H * num_new; first += kBlockGroups) {
      const int i = min(first + group_, H * num_new - 1), row = num_old + i % num_new;
      const void* const from = row_of(a_.k, s.begin + s.folded + row - s.in_ring, i / num_new);
      RawElements<Layout::kPacket> raw[Layout::kPackets];
      Row key;
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) raw[j].load(a_.k.dtype, true, from, Layout::column(j, lane_));
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) raw[j].widen(a_.k.dtype, key.x[j]);
      normalise(key);
      key.write(a_.ring.keys(s.ring_write, i / num_new, kDim) + row * kDim, lane_);
    }
  }

  __device__ int C() const {
    return Plan::kC > 0 ? Plan::kC : static_cast<int>(a_.C);
  }
  __device__ int length() const {
    return length_;
  }
  __device__ int room() const {
    return C() - length_;
  }
  __device__ int folded() const {
    return base_;
  }
  __device__ void set_length(int count) {
    length_ = count;
  }

 protected:
  /// Takes the rows of the head from `first_row` on, by the block's threads in turn.
  __device__ void take_rows(int first_row) {
    first_row_ = first_row;
    const int first_of_group = warp_ * Checkpoint::kCount + group_ % kGroups;
    group_row_ = first_row_ + first_of_group;
    num_rows_ = (V_ - group_row_ + kGroups - 1) / kGroups;  // of the group, kGroups apart, up to the end of the head
    own_row_ = first_of_group + lane_ % kRows * kGroups;
    has_row_ = lane_ < 2 * kRows && first_row_ + own_row_ < V_;
  }
  /// The row of the window at which that of token t of the batch begins: there may be one after a fold.
  __device__ int window_of(int t) const {
    return kNextRows > 0 && length_ + t >= C() ? C() : 0;
  }

  // ---- the parts of copy_ring ----

  __device__ void copy_keys(int32_t slot, int first, int count) const {
    if (kHasKeyWarp && warp_ != kKeyWarp) return;
    const float* const keys = a_.ring.keys(slot, key_head_, kDim) + first * kDim;
    const int thread = kHasKeyWarp ? threadIdx.x % 32 : threadIdx.x;
    constexpr int kThreads = kHasKeyWarp ? 32 : kReplayThreads;
#pragma unroll 1
    for (int i = 4 * thread; i < count * kDim; i += 4 * kThreads) {
      copy_async(shared_address(window_keys() + i), keys + i);
    }
  }
  __device__ void copy_gates(int32_t slot, int first, int count) const {
    const float* const gates = a_.ring.gates(slot, head_) + first;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < count; i += 32) copy_async_word(shared_address(window_gates() + i), gates + i);
  }
  /// u of kColumns of the block's rows, from `column` on, by a warp.
  template <int kColumns>
  __device__ void copy_updates(int32_t slot, int first, int count, int column) const {
    constexpr int kNeighbours = 128 / kColumns;  // rows of u that the warp copies at once
    const int lane = threadIdx.x % 32;
    const float* const u = a_.ring.updates(slot, head_, V_) + static_cast<int64_t>(first) * V_ + first_row_;
    if (V_ % 4 == 0 && reinterpret_cast<uintptr_t>(u) % 16 == 0) {
      column += 4 * lane % kColumns;
#pragma unroll 1
      for (int i = 4 * lane / kColumns; i < count && first_row_ + column < V_; i += kNeighbours) {
        copy_async(shared_address(window_u() + i * kBlockRows + column), u + i * V_ + column);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < count * kColumns; i += 32) {
        const int token = i / kColumns, row = column + i % kColumns;
        if (first_row_ + row >= V_) continue;
        copy_async_word(shared_address(window_u() + token * kBlockRows + row), u + token * V_ + row);
      }
    }
  }

  // ---- the parts of a batch ----

  /// What kCount tokens of the batch from kFirst on take from S, decayed, whatever lies behind the last one. Packets of
  /// a row, kUnrolled at once.
  template <int kFirst, int kCount, int kUnrolled = Layout::kPackets>
  __device__ void multiply_checkpoint(float (&products)[kTokens]) const {
    float sums[kCount][2 * kRows] = {};  // of a token: S k of each row, then S q
#pragma unroll kUnrolled
    for (int j = 0; j < Layout::kPackets; ++j) {
      Packet s[kRows], k[kCount], q[kCount];
#pragma unroll
      for (int r = 0; r < kRows; ++r) checkpoint_.widen(0, r, j, s[r].x);
      read_tokens<kFirst>(j, k, q);
#pragma unroll
      for (int t = 0; t < kCount; ++t) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r].add_products(k[t].x, sums[t][r]);
          s[r].add_products(q[t].x, sums[t][kRows + r]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      products[kFirst + t] = of_checkpoint()[kFirst + t] * sums_over_lanes<kLanes>(sums[t], lane_);
    }
  }
  /// u and o of tokens `first` to `end` of the batch, which is from token t of the sequence on, with the window's u
  /// from row `begin` on. value(i) is v of token i.
  template <class Value>
  __device__ void add_tokens(const ReplaySequence& s, int t, int begin, int first, int end, const Value& value,
                             float (&sums)[kTokens]) const {
    const float* const u = window_u() + own_row_;
    const Weights* const weights = is_output_ ? to_o() : to_u();
#pragma unroll 4
    for (int i = begin; i < length_; ++i) {
      const Weights w = weights[i];
      const float ui = u[i * kBlockRows];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) sums[j] = fmaf(w.x[j], ui, sums[j]);
    }
    char* const out = input_row(a_.out, s.begin + t, head_);
    float* const kept = ring_u(s, length_) + own_row_;
    const int first_kept = s.is_written ? s.first_written() - base_ - length_ : kTokens;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < first) continue;
      if (i >= end) break;
      const Weights w = weights[length_ + i];
      const float u_of_row = betas()[i] * (value(i) - sums[i]);
      const float written = __shfl_sync(0xffffffffu, u_of_row, lane_ % kRows, kLanes);
#pragma unroll
      for (int j = i; j < kTokens; ++j) sums[j] = fmaf(w.x[j], written, sums[j]);
      if (lane_ < kRows) window_u()[(length_ + i) * kBlockRows + own_row_] = written;
      if (has_row_ && is_output_) {
        store_scalar(input_type(a_.out), out + i * token_bytes(a_.out), first_row_ + own_row_, a_.scale * sums[i]);
      } else if (has_row_ && i >= first_kept) {
        kept[i * V_] = written;
      }
    }
    __syncwarp();
  }
  /// The fold of the warp's rows, as fold() is that of the block's.
  __device__ bool fold_warp(int count, int32_t to) {
    wait_for_checkpoint();
    const WindowDecays decays(window_gates(), count - 1, C() / 2);
    const Decay decay = decays.of_state();
    bool all_finite = true;
#pragma unroll 1
    for (int r = 0; r < kRows; r += kFoldedRows) all_finite &= fold_rows(r, count, decays, decay, to);
    return all_finite;
  }

  // A lane's packet of a row.
  struct Packet {
    float x[Layout::kPacket];

    __device__ void add_products(const float (&y)[Layout::kPacket], float& sum) const {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) sum = fmaf(x[i], y[i], sum);
    }
  };
  /// Packet j of the keys and queries of the batch's tokens from kFirst on.
  template <int kFirst, int kCount>
  __device__ void read_tokens(int j, Packet (&k)[kCount], Packet (&q)[kCount]) const {
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      Layout::read(window_keys() + (length_ + kFirst + t) * kDim, j, lane_, k[t].x);
      Layout::read(queries() + (kFirst + t) * kDim, j, lane_, q[t].x);
    }
  }
  /// The weights of the window's u in u and o of the batch's tokens.
  __device__ void multiply_window(int count) const {
    const int last = length_ + count - 1;
    const int own = lane_ % (2 * kTokens) / 2;  // the token, of which a lane gets a product
#pragma unroll 1
    for (int first = group_ - group_ % kGroups; first <= last; first += kBlockGroups) {  // of the warp
      const int i = min(first + group_ % kGroups, last);
      const bool has_product = lane_ < 2 * kTokens && own < count && first + group_ % kGroups <= length_ + own;
      const float decay = has_product ? to_u()[i].x[own] : 0.0f;  // which the weight replaces
      float sums[2 * kTokens] = {};
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) {
        Packet key, k[kTokens], q[kTokens];
        Layout::read(window_keys() + i * kDim, j, lane_, key.x);
        read_tokens<0>(j, k, q);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          key.add_products(k[t].x, sums[2 * t]);
          key.add_products(q[t].x, sums[2 * t + 1]);
        }
      }
      const float product = sums_over_lanes<kLanes>(sums, lane_);
      __syncwarp();
      if (has_product) (lane_ % 2 == 0 ? to_u() : to_o())[i].x[own] = decay * product;
    }
  }
  __device__ State* rows_in(int32_t slot, int row) const {
    return static_cast<State*>(a_.state.data) + slot * a_.state.stride +
           (static_cast<int64_t>(head_) * V_ + row) * kDim;
  }
  __device__ void store(int32_t slot, int r, const Row& s) const {
    if (r < num_rows_) s.store_once(rows_in(slot, group_row_ + r * kGroups), lane_);
  }
  /// The fold of rows r to r + kFoldedRows of a group. Returns whether they are finite.
  __device__ bool fold_rows(int r, int count, const WindowDecays& decays, const Decay& decay, int32_t to) {
    const float* const u = window_u() + (group_row_ - first_row_) + r * kGroups;
    bool all_finite = true;
    Row s[kFoldedRows];
#pragma unroll
    for (int i = 0; i < kFoldedRows; ++i) {
      checkpoint_.widen(0, r + i, s[i]);
      s[i].scale(decay.factor);
    }
    const auto add = [&](int c, float of_row) {
      Row key;
      key.read(window_keys() + c * kDim, lane_);
#pragma unroll
      for (int i = 0; i < kFoldedRows; ++i) s[i].add(of_row * u[c * kBlockRows + i * kGroups], key);
    };
#pragma unroll 1
    for (int pair = 0; 2 * pair < count; ++pair) {
      const float even = __shfl_sync(0xffffffffu, decays.even, pair), odd = __shfl_sync(0xffffffffu, decays.odd, pair);
      add(2 * pair, even);
      if (2 * pair + 1 < count) add(2 * pair + 1, odd);
    }
#pragma unroll
    for (int i = 0; i < kFoldedRows; ++i) {
      if (decay.kept != 0.0f) {
        Row before;
        checkpoint_.widen(0, r + i, before);
        s[i].add(1.0f, before);
      }
      checkpoint_.put(0, r + i, s[i]);
      if (to >= 0) store(to, r + i, s[i]);
      if (r + i < num_rows_) all_finite &= is_finite(s[i]);
    }
    return all_finite;
  }
  /// Whether a State holds the row: no NaN, nothing that is infinite when it is rounded.
  __device__ static bool is_finite(const Row& s) {
    bool is_held = true;
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) is_held &= fabsf(s.x[j][i]) <= kLargestState<State>;
    }
    return is_held;
  }
  __device__ void normalise(Row& x) const {
    if (a_.normalise_qk) x.scale(rsqrtf(sum_over_lanes<kLanes>(x.dot(x)) + kNormEps));
  }
  /// Whether a row of the window is one of those that the written ring gets, and where.
  __device__ bool is_kept(const ReplaySequence& s, int row) const {
    return s.is_written && base_ + row >= s.first_written();
  }
  __device__ int ring_row(const ReplaySequence& s, int row) const {
    return base_ + row - s.folded;
  }
  __device__ float* ring_u(const ReplaySequence& s, int row) const {
    return a_.ring.updates(s.ring_write, head_, V_) + static_cast<int64_t>(ring_row(s, row)) * V_ + first_row_;
  }

  /// Whether the warp stages keys and queries: those of the batch's tokens, in turn, over the block's first groups.
  __device__ bool stages_keys() const {
    return warp_ * kGroups < 2 * kTokens;
  }
  __device__ const InRows& staged_rows() const {
    return group_ % 2 == 0 ? a_.k : a_.q;
  }
  __device__ int staged_token() const {
    return min(group_ / 2, kTokens - 1);
  }
  /// Of q, k, v and out.
  template <class Rows>
  __device__ static DType input_type(const Rows& rows) {
    using In = typename Plan::In;
    if constexpr (std::is_void_v<In>) return rows.dtype;
    return std::is_same_v<In, float>    ? DType::kFloat32
           : std::is_same_v<In, __half> ? DType::kFloat16
                                        : DType::kBFloat16;
  }
  template <class Rows>
  __device__ static int element_size(const Rows& rows) {
    return input_type(rows) == DType::kFloat32 ? 4 : 2;
  }
  __device__ static const char* input_row(const InRows& rows, int64_t token, int64_t head) {
    return static_cast<const char*>(rows.data) +
           (token * rows.token_stride + head * rows.head_stride) * element_size(rows);
  }
  __device__ static char* input_row(const OutRows& rows, int64_t token, int64_t head) {
    return static_cast<char*>(rows.data) + (token * rows.token_stride + head * rows.head_stride) * element_size(rows);
  }
  template <class Rows>
  __device__ static int64_t token_bytes(const Rows& rows) {
    return rows.token_stride * element_size(rows);
  }

  struct alignas(sizeof(float) * kTokens) Weights {
    float x[kTokens];
  };

  // ---- shared memory behind S: the window, and a batch ----

  __device__ int window_rows() const {
    return C() + kNextRows;
  }

  /// [window_rows(), K]
  __device__ float* window_keys() const {
    return shared_ + Checkpoint::kStageBytes / sizeof(float);
  }
  /// [window_rows(), kBlockRows]. The last row lies over the queries: a batch reads them before it writes the row, and
  /// a verification, whose warps do not wait for each other, has too few tokens to write it.
  __device__ float* window_u() const {
    return window_keys() + window_rows() * kDim;
  }
  /// [kTokens, K]
  __device__ float* queries() const {
    return window_u() + (window_rows() - 1) * kBlockRows;
  }
  /// [window_rows()] of the window's u in the tokens' u; first the decays up to the tokens.
  __device__ Weights* to_u() const {
    return reinterpret_cast<Weights*>(queries() + kQueries);
  }
  /// [window_rows()] and in the tokens' o
  __device__ Weights* to_o() const {
    return to_u() + window_rows();
  }
  /// [window_rows()]
  __device__ float* window_gates() const {
    return reinterpret_cast<float*>(to_o() + window_rows());
  }
  /// [kTokens] the decay of S
  __device__ float* of_checkpoint() const {
    return window_gates() + window_rows();
  }
  /// [kTokens]
  __device__ float* betas() const {
    return of_checkpoint() + kTokens;
  }

  // Which copy the parts of a ring. That blocks of bf16 checkpoints leave the keys to a warp, and those of f32 to all,
  // was measured.
  static constexpr bool kHasKeyWarp = sizeof(State) == 2;
  static constexpr int kKeyWarp = 1, kUpdateWarp = 2, kGateWarp = 3;
  static_assert(kReplayWarps > kGateWarp);
  /// Rows of a group that are folded at once: few where a multiprocessor's registers hold many blocks.
  static constexpr int kFoldedRows = Plan::kBlocks <= 4 || kRows < 2 ? kRows : sizeof(State) == 4 ? 1 : 2;
  static constexpr int kQueries = std::max(kTokens * kDim, kBlockRows);

  const ReplayGatedDeltaRuleArgs& a_;
  int V_, head_;
  int key_head_;
  bool is_of_key_;  // the first value head of its key head
  int warp_, lane_, group_;
  int first_row_;  // of the block
  int group_row_;  // the first of the group; num_rows_ of them, kGroups apart, up to the end of the head
  int num_rows_;
  int own_row_;  // of the block, whose u or o the lane computes
  bool has_row_, is_output_;
  float* shared_;  // S, and behind it the window
  Checkpoint checkpoint_;

  int turn_ = 0;    // of the copies of S, the last one
  int length_ = 0;  // of the window
  int base_ = 0;    // tokens before it, which have been folded
};

}  // namespace xgdn::kernel::cuda
