// SPDX-License-Identifier: Apache-2.0
// What a block computes of the gated delta rule on checkpoints and rings; the maths is that of
// docs/gated_delta_rule.md, "Replay states".
//
// A block takes rows of one head of one sequence, from the sequence's first token to the last. In shared memory it has
// those rows of the checkpoint S, and the window: the tokens since the checkpoint, up to C of them. The tokens of a
// call join the window in batches; once it is full it is folded into S, if more tokens follow or all are committed.
//
//   batch:  keys, queries and gates of its tokens -> window | barrier |
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

#include <cfloat>

#include "core/kernels/cuda/gates.cuh"
#include "core/kernels/cuda/state_rows.cuh"
#include "core/kernels/op_args.h"

namespace xgdn::kernel::cuda {

inline constexpr int kReplayWarps = 4;
inline constexpr int kReplayThreads = kReplayWarps * 32;
inline constexpr unsigned kRingLengthBits = 8;  // of a ring's length; those above count blocks

/// A sequence of the call. Its tokens are numbered from its checkpoint on: first those of the ring, then the call's.
struct ReplaySequence {
  int64_t begin;  // among the call's tokens
  int len;
  int32_t read, write, ring_read, ring_write;
  bool has_initial_state;
  int in_ring;  // tokens
  int folded;   // tokens that the written checkpoint contains beyond the one that is read
  bool is_written;

  __device__ ReplaySequence(const ReplayGatedDeltaRuleArgs& a, int64_t n)
      : begin(a.cu_seqlens[n]),
        len(static_cast<int>(a.cu_seqlens[n + 1] - begin)),
        read(a.state.read[n]),
        write(a.state.write[n]),
        ring_read(a.ring.read[n]),
        ring_write(a.ring.write[n]),
        has_initial_state(a.has_initial_state == nullptr || a.has_initial_state[n]),
        is_written(read >= 0 && write >= 0 && ring_write >= 0) {}

  __device__ void read_length(const ReplayGatedDeltaRuleArgs& a, int64_t n) {
    const auto C = static_cast<int>(a.C);
    in_ring = 0;
    if (has_initial_state) {
      const auto word = static_cast<unsigned>(__ldcg(a.ring.length + ring_read));
      in_ring =
          static_cast<int>(word & ((1u << kRingLengthBits) - 1)) + (a.num_accepted == nullptr ? 0 : a.num_accepted[n]);
    }
    folded = a.commit ? (in_ring + len) & -C : in_ring >= C ? C : 0;  // C is a power of two
  }

  __device__ int end() const { return in_ring + len; }
  __device__ int written_length(bool commit) const { return (commit ? end() : in_ring) - folded; }
  __device__ bool is_in_place() const { return has_initial_state && ring_read == ring_write; }
  /// The first token that the written ring lacks.
  __device__ int first_written() const { return is_in_place() && folded == 0 ? in_ring : folded; }
  /// Whether rows are written that other blocks may still have to read.
  __device__ bool overwrites() const { return is_in_place() && folded > 0 && end() > folded; }
};

/// Decays from the rows of a window to one of them, `last`. A lane has two rows, whose gates are summed in double from
/// the last row backwards, by halves: what a sum has depends on its rows alone. No difference is taken: of sums over
/// the whole window it would be all noise behind a gate that wipes the state.
struct WindowDecays {
  double of_all;  // the logarithm of the decay of S

  WindowDecays() = default;
  __device__ WindowDecays(const float* gates, int last) {
    const int lane = threadIdx.x % 32;
    const auto gate = [&](int row) { return row <= last ? static_cast<double>(gates[row]) : 0.0; };
    const double odd = gate(2 * lane + 1);
    double sum = gate(2 * lane) + odd;  // of the lane's rows and those behind
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const double behind = __shfl_down_sync(0xffffffffu, sum, step);
      sum += lane + step < 32 ? behind : 0.0;
    }
    of_all = __shfl_sync(0xffffffffu, sum, 0);
    const double next = __shfl_down_sync(0xffffffffu, sum, 1);
    const double behind = lane == 31 ? 0.0 : next;
    odd_ = expf(static_cast<float>(behind));
    even_ = expf(static_cast<float>(behind + odd));
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
  /// All lanes of the warp, which may ask for different rows, none behind the last.
  __device__ float of_row(int row) const {
    const float even = __shfl_sync(0xffffffffu, even_, row / 2);
    const float odd = __shfl_sync(0xffffffffu, odd_, row / 2);
    return row % 2 == 0 ? even : odd;
  }

 private:
  float even_, odd_;
};

/// Rows of a head of a sequence, and the window, which lies in shared memory behind S.
template <class State, int kDim, int kRows, int kTokens>
class ReplayBlock {
 public:
  using Layout = RowLayout<State, kDim>;
  static constexpr int kLanes = Layout::kLanes;
  static constexpr int kGroups = 32 / kLanes;  // of a warp
  static constexpr int kBlockRows = kReplayWarps * kGroups * kRows;
  static constexpr int kBlockGroups = kReplayWarps * kGroups;
  static_assert(2 * kRows <= kLanes && 2 * kTokens <= kLanes && 2 * kTokens <= kBlockGroups);
  using Checkpoint = RowsInFlight<State, kDim, kRows, 1, kReplayThreads, kGroups>;
  using Row = LaneRow<State, kDim>;

  /// Of shared memory.
  static size_t bytes(int64_t C) {
    return Checkpoint::kBytes + sizeof(float) * (C * (kDim + kBlockRows + 1) + kTokens * (kDim + 2 * C));
  }

  __device__ ReplayBlock(const ReplayGatedDeltaRuleArgs& args, uint4* shared)
      : a_(args),
        C_(static_cast<int>(args.C)),
        V_(static_cast<int>(args.V)),
        head_(blockIdx.y),
        heads_of_key_(static_cast<int>(args.HV) / static_cast<int>(args.H)),
        key_head_(head_ / heads_of_key_),
        lane_(threadIdx.x % kLanes),
        group_(threadIdx.x / kLanes),
        checkpoint_(shared) {
    keys_ = reinterpret_cast<float*>(shared + Checkpoint::kBytes / sizeof(uint4));
    queries_ = keys_ + C_ * kDim;
    u_ = queries_ + kTokens * kDim;
    to_u_ = reinterpret_cast<Weights*>(u_ + C_ * kBlockRows);
    to_o_ = to_u_ + C_;
    gates_ = reinterpret_cast<float*>(to_o_ + C_);
    first_row_ = blockIdx.x * kBlockRows;
    const int first_of_group = threadIdx.x / 32 * kGroups * kRows + group_ % kGroups;
    group_row_ = first_row_ + first_of_group;
    num_rows_ = (V_ - group_row_ + kGroups - 1) / kGroups;  // of the group, kGroups apart, up to the end of the head
    own_row_ = first_of_group + lane_ % kRows * kGroups;
    has_row_ = lane_ < 2 * kRows && first_row_ + own_row_ < V_;
    is_output_ = lane_ % (2 * kRows) >= kRows;
  }

  /// x, as the block's outputs of tokens `begin` to `begin + len`.
  __device__ void fill_outputs(int64_t begin, int len, float x) const {
    for (int t = 0; t < len; ++t) {
      for (int row = threadIdx.x; row < min(kBlockRows, V_ - first_row_); row += kReplayThreads) {
        store_scalar(a_.out.dtype, row_of(a_.out, begin + t, head_), first_row_ + row, x);
      }
    }
  }

  // ---- copies to shared memory, which wait_for_copies() awaits ----

  __device__ void copy_checkpoint(int32_t slot) {
    checkpoint_.copy(0, rows_in(slot), lane_, num_rows_);
    commit_copies();
  }
  __device__ void clear_checkpoint() {
    for (int r = 0; r < kRows; ++r) checkpoint_.put(0, r, Row{});
  }
  /// Rows `first` to `first + count` of a ring, at most C of them, to the begin of the window.
  __device__ void copy_ring(int32_t slot, int first, int count) {
    const float* const keys = a_.ring.keys(slot, key_head_, kDim) + first * kDim;
    for (int i = 4 * threadIdx.x; i < count * kDim; i += 4 * kReplayThreads)
      copy_async(shared_address(keys_ + i), keys + i);
    const float* const u = a_.ring.updates(slot, head_, V_) + static_cast<int64_t>(first) * V_ + first_row_;
    for (int i = threadIdx.x; i < count * kBlockRows; i += kReplayThreads) {
      const int row = i % kBlockRows;
      if (first_row_ + row < V_) copy_async_word(shared_address(u_ + i), u + i / kBlockRows * V_ + row);
    }
    const float* const gates = a_.ring.gates(slot, head_) + first;
    if (static_cast<int>(threadIdx.x) < count)
      copy_async_word(shared_address(gates_ + threadIdx.x), gates + threadIdx.x);
    commit_copies();
  }
  __device__ void wait_for_copies() const {
    wait_copies<0>();
    __syncthreads();
  }

  // ---- tokens ----

  /// Loads what a batch from token t of the sequence on needs.
  __device__ void load_tokens(const ReplaySequence& s, int t) {
    if (t >= s.len) return;
    const auto token = [&](int i) { return s.begin + min(t + i, s.len - 1); };
    const InRows& rows = group_ % 2 == 0 ? a_.k : a_.q;
    const void* const row = row_of(rows, token(min(group_ / 2, kTokens - 1)), key_head_);
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) raw_key_[j].load(rows.dtype, true, row, Layout::column(j, lane_));
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      raw_v_[i].load(a_.v.dtype, row_of(a_.v, token(i), head_), min(first_row_ + own_row_, V_ - 1));
      raw_beta_[i].load(a_.beta.dtype, row_of(a_.beta, token(i), head_), 0);
    }
    raw_gate_.load(a_.g.dtype, row_of(a_.g, token(min(static_cast<int>(threadIdx.x), kTokens - 1)), head_), 0);
  }
  /// Appends the first `count` of them to the window: a group makes the key of a token, the next one its query.
  __device__ void stage_tokens(int count) {
    Row x;
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) raw_key_[j].widen(a_.k.dtype, x.x[j]);
    normalise(x);
    const int i = group_ / 2;
    if (i < count) x.write(group_ % 2 == 0 ? keys_ + (length_ + i) * kDim : queries_ + i * kDim, lane_);
    if (static_cast<int>(threadIdx.x) < count) gates_[length_ + threadIdx.x] = raw_gate_.widened(a_.g.dtype);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      v_[t] = raw_v_[t].widened(a_.v.dtype);
      beta_[t] = raw_beta_[t].widened(a_.beta.dtype);
    }
  }

  /// What `count` > 0 staged tokens take from the window's keys and, decayed, from S. A barrier before it, and behind.
  /// It computes for kTokens tokens, whatever lies behind the last one.
  __device__ void multiply(int count, float (&products)[kTokens]) {
    WindowDecays decays[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) decays[t] = WindowDecays(gates_, min(length_ + t, C_ - 1));
    multiply_window(count, decays);
    float sums[kTokens][2 * kRows] = {};  // of a token: S k of each row, then S q
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
      Packet s[kRows], k[kTokens], q[kTokens];
#pragma unroll
      for (int r = 0; r < kRows; ++r) checkpoint_.widen(0, r, j, s[r].x);
      read_tokens(j, k, q);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          s[r].add_products(k[t], sums[t][r]);
          s[r].add_products(q[t], sums[t][kRows + r]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      products[t] = expf(static_cast<float>(decays[t].of_all)) * sums_over_lanes<kLanes>(sums[t], lane_);
    }
  }
  /// u and o of those tokens, from token t of the sequence on. Rows of u stay with the lanes of a warp.
  __device__ void add_tokens(const ReplaySequence& s, int t, int count, float (&sums)[kTokens]) {
    const float* const u = u_ + own_row_;
    const Weights* const weights = is_output_ ? to_o_ : to_u_;
#pragma unroll 4
    for (int i = 0; i < length_; ++i) {
      const Weights w = weights[i];
      const float ui = u[i * kBlockRows];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) sums[j] = fmaf(w.x[j], ui, sums[j]);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i >= count) break;
      const int row = length_ + i;
      const Weights w = weights[row];
      const float written = __shfl_sync(0xffffffffu, beta_[i] * (v_[i] - sums[i]), lane_ % kRows, kLanes);
#pragma unroll
      for (int j = i; j < kTokens; ++j) sums[j] = fmaf(w.x[j], written, sums[j]);
      if (lane_ < kRows) u_[row * kBlockRows + own_row_] = written;
      if (has_row_ && is_output_) {
        store_scalar(a_.out.dtype, row_of(a_.out, s.begin + t + i, head_), first_row_ + own_row_, a_.scale * sums[i]);
      } else if (has_row_ && is_kept(s, row)) {
        ring_u(s, row)[own_row_] = written;
      }
    }
    __syncwarp();
    length_ += count;
  }

  // ---- the fold ----

  /// S <- D S + sum_i D_i u_i k_i^T after the window's first `count` > 0 tokens; to slot `to` as well, unless negative.
  /// Ends with a barrier. Returns whether the block's rows of it are finite.
  __device__ bool fold(int count, int32_t to) {
    const WindowDecays decays(gates_, count - 1);
    const Decay decay = decays.of_state();
    bool all_finite = true;
#pragma unroll 1
    for (int r = 0; r < kRows; r += kFoldedRows) all_finite &= fold_rows(r, count, decays, decay, to);
    base_ += count;
    length_ = 0;
    return __syncthreads_and(all_finite) != 0;
  }

  // ---- what is written beside outputs, u and folds ----

  /// The checkpoint as it was read.
  __device__ void store_checkpoint(int32_t to) const {
    for (int r = 0; r < kRows; ++r) {
      Row s;
      checkpoint_.widen(0, r, s);
      store(to, r, s);
    }
  }
  /// u of rows that were in the ring, where the written ring lacks them.
  __device__ void write_old_updates(const ReplaySequence& s) const {
    if (length_ == 0 || !is_kept(s, 0)) return;
    for (int i = threadIdx.x; i < length_ * kBlockRows; i += kReplayThreads) {
      const int row = i % kBlockRows;
      if (first_row_ + row < V_) ring_u(s, i / kBlockRows)[row] = u_[i];
    }
  }
  /// Keys and gates of `count` rows of the window from `first` on, of which one block of a head or key head has charge.
  __device__ void write_keys(const ReplaySequence& s, int first, int count) const {
    if (count == 0 || blockIdx.x != 0 || s.overwrites() || !is_kept(s, first)) return;
    const int to = ring_row(s, first);
    float* const gates = a_.ring.gates(s.ring_write, head_) + to;
    for (int i = threadIdx.x; i < count; i += kReplayThreads) gates[i] = gates_[first + i];
    if (head_ % heads_of_key_ != 0) return;
    auto* const keys = reinterpret_cast<float4*>(a_.ring.keys(s.ring_write, key_head_, kDim) + to * kDim);
    const auto* const from = reinterpret_cast<const float4*>(keys_ + first * kDim);
    for (int i = threadIdx.x; i < count * kDim / 4; i += kReplayThreads) keys[i] = from[i];
  }
  /// Those of all rows and heads that the written ring has, by the block that has read the old ring last.
  __device__ void write_all_keys(const ReplaySequence& s) const {
    const int H = static_cast<int>(a_.H), HV = static_cast<int>(a_.HV);
    const int num_old = max(0, s.in_ring - s.folded), num_new = s.end() - s.folded - num_old;
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
    for (int i = threadIdx.x; i < HV * num_new; i += kReplayThreads) {
      const int head = i / num_new, row = num_old + i % num_new;
      a_.ring.gates(s.ring_write, head)[row] =
          load_scalar(a_.g.dtype, row_of(a_.g, s.begin + s.folded + row - s.in_ring, head), 0);
    }
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

  __device__ int length() const {
    return length_;
  }
  __device__ int room() const {
    return C_ - length_;
  }
  __device__ int folded() const {
    return base_;
  }
  __device__ void set_length(int count) {
    length_ = count;
  }

 private:
  // A lane's packet of a row.
  struct Packet {
    float x[Layout::kPacket];

    __device__ void add_products(const Packet& y, float& sum) const {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) sum = fmaf(x[i], y.x[i], sum);
    }
  };
  /// Packet j of the batch's keys and queries.
  __device__ void read_tokens(int j, Packet (&k)[kTokens], Packet (&q)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      Layout::read(keys_ + (length_ + t) * kDim, j, lane_, k[t].x);
      Layout::read(queries_ + t * kDim, j, lane_, q[t].x);
    }
  }
  /// The weights of the window's u in u and o of the batch's tokens.
  __device__ void multiply_window(int count, const WindowDecays (&decays)[kTokens]) const {
    const int last = length_ + count - 1;
    const int own = lane_ % (2 * kTokens) / 2;  // the token, of which a lane gets a product
#pragma unroll 1
    for (int first = 0; first <= last; first += kBlockGroups) {
      const int i = min(first + group_, last);
      float sums[2 * kTokens] = {};
#pragma unroll
      for (int j = 0; j < Layout::kPackets; ++j) {
        Packet key, k[kTokens], q[kTokens];
        Layout::read(keys_ + i * kDim, j, lane_, key.x);
        read_tokens(j, k, q);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          key.add_products(k[t], sums[2 * t]);
          key.add_products(q[t], sums[2 * t + 1]);
        }
      }
      const float product = sums_over_lanes<kLanes>(sums, lane_);
      float decay = 1.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float of_row = decays[t].of_row(i);
        if (t == own) decay = of_row;
      }
      if (lane_ >= 2 * kTokens || own >= count || first + group_ > length_ + own) continue;
      (lane_ % 2 == 0 ? to_u_ : to_o_)[i].x[own] = decay * product;
    }
  }
  __device__ State* rows_in(int32_t slot) const {
    return static_cast<State*>(a_.state.data) + slot * a_.state.stride +
           (static_cast<int64_t>(head_) * V_ + group_row_) * kDim;
  }
  __device__ void store(int32_t slot, int r, const Row& s) const {
    if (r < num_rows_) s.store_once(rows_in(slot) + r * kGroups * kDim, lane_);
  }
  /// The fold of rows r to r + kFoldedRows of a group. Returns whether they are finite.
  __device__ bool fold_rows(int r, int count, const WindowDecays& decays, const Decay& decay, int32_t to) {
    const float* const u = u_ + (group_row_ - first_row_) + r * kGroups;
    bool all_finite = true;
    Row s[kFoldedRows];
#pragma unroll
    for (int i = 0; i < kFoldedRows; ++i) {
      checkpoint_.widen(0, r + i, s[i]);
      s[i].scale(decay.factor);
    }
#pragma unroll 2
    for (int c = 0; c < count; ++c) {
      const float of_row = decays.of_row(c);
      Row key;
      key.read(keys_ + c * kDim, lane_);
#pragma unroll
      for (int i = 0; i < kFoldedRows; ++i) s[i].add(of_row * u[c * kBlockRows + i * kGroups], key);
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
    constexpr float kLargest = sizeof(State) == sizeof(float) ? FLT_MAX : 0x1.fefffep127f;
    bool is_held = true;
#pragma unroll
    for (int j = 0; j < Layout::kPackets; ++j) {
#pragma unroll
      for (int i = 0; i < Layout::kPacket; ++i) is_held &= fabsf(s.x[j][i]) <= kLargest;
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

  struct alignas(sizeof(float) * kTokens) Weights {
    float x[kTokens];
  };
  static constexpr int kFoldedRows = kRows < 2 ? 1 : 2;  // at once

  const ReplayGatedDeltaRuleArgs& a_;
  int C_, V_, head_;
  int heads_of_key_;  // value heads of a key head
  int key_head_, lane_, group_;
  int first_row_;  // of the block
  int group_row_;  // the first of the group; num_rows_ of them, kGroups apart, up to the end of the head
  int num_rows_;
  int own_row_;  // of the block, whose u or o the lane computes
  bool has_row_, is_output_;
  Checkpoint checkpoint_;

  // The window, in shared memory.
  float* keys_;     // [C, K]
  float* u_;        // [C, kBlockRows]
  float* gates_;    // [C]
  int length_ = 0;  // tokens
  int base_ = 0;    // tokens before them, which have been folded

  // A batch, in shared memory.
  float* queries_;  // [kTokens, K]
  Weights* to_u_;   // [C]           of the window's u in the tokens' u
  Weights* to_o_;   // [C]           and o

  float v_[kTokens], beta_[kTokens];

  // On its way.
  RawElements<Layout::kPacket> raw_key_[Layout::kPackets];  // or the query
  RawScalar raw_v_[kTokens], raw_beta_[kTokens], raw_gate_;
};

}  // namespace xgdn::kernel::cuda
