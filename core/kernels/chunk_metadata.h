// SPDX-License-Identifier: Apache-2.0
// Chunk metadata of a prefill batch: which chunk of which sequence a program works on. Built once per step on the host,
// never inside an op.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "core/errors.h"

namespace xgdn::kernel {

inline constexpr int64_t kChunkSize = 64;       // C of the delta rule
inline constexpr int64_t kLargeBlock = 1216;    // chunk size of chunk_indices_large_block
inline constexpr int64_t kMaxCumsumHeads = 64;  // block_indices_cumsum is refused above
/// The largest token, row, slot or block that an index tensor can name.
inline constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

/// With n_i(C) = ceil(len_i / C) over the N sequences of the batch. All int32.
struct ChunkMetadata {
  at::Tensor chunk_indices_chunk64;         // [sum n_i(64), 2]    rows (i, j), j < n_i(64)
  at::Tensor chunk_offsets_chunk64;         // [N+1]               0, cumsum n_i(64)
  at::Tensor update_chunk_offsets_chunk64;  // [N+1]               0, cumsum (n_i(64) + 1)
  at::Tensor final_chunk_indices_chunk64;   // [N]                 cumsum (n_i(64) + 1) - 1
  at::Tensor chunk_indices_large_block;     // [sum n_i(1216), 2]  as the first, C = 1216
  at::Tensor block_indices_cumsum;          // [sum n_i(B), 2]     as the first, C = cumsum_block(HV_local)
};

/// Which sequence ids the index rows carry. kCompactRanks counts non-empty sequences only, as kernels elsewhere
/// expect it; behind an interior empty sequence it names the wrong one, so it is never the default.
enum class SequenceIds { kTrue, kCompactRanks };

/// Block length of block_indices_cumsum: next_pow2(max(1, 2^18 / (num_v_heads_local * 64))). Throws UnsupportedError
/// when num_v_heads_local > 64 or < 1.
int64_t cumsum_block(int64_t num_v_heads_local);

/// The two tables that chunk_gated_delta_rule takes, as host vectors; what the batch builder packs into its buffers.
struct ChunkTables {
  std::vector<int32_t> indices;  // chunk_indices_chunk64, row after row
  std::vector<int32_t> offsets;  // chunk_offsets_chunk64
};

/// Builds the two tables from sequence lengths, for any number of heads. Throws RangeError, before anything is
/// allocated, for a length below 0 and for more than kMaxIndex tokens and sequences together.
ChunkTables build_chunk_tables(const std::vector<int64_t>& lengths, SequenceIds ids = SequenceIds::kTrue);

/// Builds all six as views of one arena on `device`. num_v_heads_local: of block_indices_cumsum alone, which no op of
/// this library reads; for kernels that do. Throws RangeError as build_chunk_tables, UnsupportedError as cumsum_block.
ChunkMetadata build_chunk_metadata(const std::vector<int64_t>& lengths, int64_t num_v_heads_local = 1,
                                   SequenceIds ids = SequenceIds::kTrue, c10::Device device = c10::kCPU);

/// Tables with room for every step of at most max_sequences sequences and max_tokens tokens, uninitialised: pooled
/// memory, so that a captured step finds its tables where they were. Throws RangeError as build_chunk_tables.
ChunkMetadata allocate_chunk_metadata(int64_t max_sequences, int64_t max_tokens, int64_t num_v_heads_local,
                                      c10::Device device);

/// Writes the tables of the sequences in cu_seqlens [N+1] (true ids) to the front of `tables`, by work on their device
/// alone: nothing is read on the host and every shape is that of the pool. Behind the step's rows the index tables hold
/// (-1, -1), final_chunk_indices -1, and the offsets repeat their last value: no chunks. Throws ShapeError when N
/// sequences do not fit, and DtypeError, ShapeError or DeviceError for tensors that are no int32 tables of one device
/// or share memory; that the chunks fit is the caller's promise.
void write_chunk_metadata(const at::Tensor& cu_seqlens, int64_t num_v_heads_local, const ChunkMetadata& tables);

}  // namespace xgdn::kernel
