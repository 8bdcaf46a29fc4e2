// SPDX-License-Identifier: Apache-2.0
// A sequence of a call on replay states: its tokens, its slots, and what is folded and written.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/replay_gated_delta_rule.h"

namespace xgdn::kernel::cuda {

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

  __device__ ReplaySequence(const ReplayPartArgs& a, int64_t n)
      : begin(a.cu_seqlens[n]),
        len(static_cast<int>(a.ends[n] - begin)),
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

}  // namespace xgdn::kernel::cuda
