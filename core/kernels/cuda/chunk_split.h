// SPDX-License-Identifier: Apache-2.0
// Whether chunk_gated_delta_rule cuts long sequences into pieces that run side by side, and where.
//
// A sequence alone gives the device a block for each value head and 64 rows of its state; with few of them most
// multiprocessors would idle while the chunks pass one after the other. A piece can run beside the ones before it once
// somebody has found the state that it starts from, by a scan for states alone, which computes no outputs:
//
//   ahead   Two pieces, the first the longer. The scan for states takes the first piece from the sequence's own state,
//           while another block scans the same piece for its outputs; it is done earlier, and the second piece follows.
//           The state at the cut has the bits that it has without a cut, so this may depend on the batch.
//   jumps   Equal pieces. Each but the last is scanned for what it adds to a state and for the map that it applies to
//           one (K more rows), all at once; the state at a cut is the one at the cut before, times the map, plus what
//           was added. That sums in another order, so whether and where a sequence is cut depends on its own length,
//           the heads and the device alone: it has the same bits in every batch.
//
// Jumps make 2 to 2.5 times the products of a plain scan, so a batch that fills the device anyway pays for a sequence's
// right to its bits. They are for heads of which a sequence fills at most a quarter of the device, and for sequences
// of 4,096 tokens and more: a step of 8,192 tokens has two of them at most.
#pragma once

#include <algorithm>
#include <cstdint>

namespace xgdn::kernel::cuda {

/// How sequences are cut, by their number of chunks. A sequence of p pieces has p - 1 cuts.
struct ChunkSplit {
  int32_t min_chunks = 0;        // shorter sequences stay whole
  int32_t chunks_per_piece = 1;  // at least
  int32_t max_pieces = 1;
  int32_t lead = 0;  // the first piece is as long as lead + 1 others

  constexpr bool cuts() const { return max_pieces > 1; }
  constexpr bool jumps() const { return max_pieces > 2; }

  constexpr int32_t pieces(int32_t chunks) const {
    if (!cuts() || chunks < min_chunks) return 1;
    const int32_t fit = chunks / chunks_per_piece;
    return fit < max_pieces ? fit : max_pieces;
  }

  /// The chunk at which piece `piece` of `count` begins; that of piece `count` is the sequence's end.
  constexpr int32_t first_chunk(int32_t chunks, int32_t count, int32_t piece) const {
    if (piece == 0) return 0;
    return static_cast<int32_t>(static_cast<int64_t>(chunks) * (lead + piece) / (lead + count));
  }

  /// Cuts of `num_sequences` sequences of `num_chunks` chunks in all, at most.
  constexpr int64_t most_cuts(int64_t num_sequences, int64_t num_chunks) const {
    if (!cuts()) return 0;
    const int64_t long_ones = std::min<int64_t>(num_sequences, num_chunks / min_chunks);
    return std::min<int64_t>(long_ones * (max_pieces - 1), num_chunks / chunks_per_piece);
  }
};

/// What the host knows of a call. `max_chunks`: of the longest sequence, or more.
struct SplitFacts {
  int64_t num_multiprocessors = 0;
  int64_t blocks_per_sequence = 0;  // value heads times groups of 64 rows of a state
  int64_t num_sequences = 0;
  int64_t max_chunks = 0;
};

// A jump costs about 2 us, a chunk 1.2: shorter pieces would gain nothing.
inline constexpr int32_t kChunksPerJump = 16;
inline constexpr int32_t kMinJumpingChunks = 64;
inline constexpr int32_t kMostPieces = 16;  // the last piece makes that many jumps, less two

// Another launch costs about 3 us.
inline constexpr int32_t kMinChunksAhead = 32;
// A scan for states takes about 0.7 of the time of one with outputs: cut at 4/5, both ways to the end take 0.8.
inline constexpr int32_t kLeadAhead = 3;

inline constexpr ChunkSplit choose_split(const SplitFacts& facts) {
  const int64_t room = facts.num_multiprocessors / std::max<int64_t>(facts.blocks_per_sequence, 1);
  if (room >= 4 && facts.max_chunks >= kMinJumpingChunks) {
    return {kMinJumpingChunks, kChunksPerJump, static_cast<int32_t>(std::min<int64_t>(room, kMostPieces)), 0};
  }
  if (room >= 2 * facts.num_sequences && facts.max_chunks >= kMinChunksAhead) {
    return {kMinChunksAhead, kMinChunksAhead / 2, 2, kLeadAhead};
  }
  return {};
}

}  // namespace xgdn::kernel::cuda
