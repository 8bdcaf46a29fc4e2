// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/chunk_metadata.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>

namespace xgdn::kernel {
namespace {

int64_t num_chunks(int64_t length, int64_t chunk) {
  return (length + chunk - 1) / chunk;
}

// Rows (i, j), j < ceil(len_i / chunk); i is the true sequence id or its rank among the non-empty ones.
std::vector<int32_t> index_rows(const std::vector<int64_t>& lengths, int64_t chunk, SequenceIds ids) {
  std::vector<int32_t> rows;
  int32_t rank = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    const int32_t id = ids == SequenceIds::kTrue ? static_cast<int32_t>(i) : rank;
    for (int64_t j = 0; j < num_chunks(lengths[i], chunk); ++j) {
      rows.push_back(id);
      rows.push_back(static_cast<int32_t>(j));
    }
    rank += lengths[i] > 0;
  }
  return rows;
}

// 0, then the running sum of n_i(64) + extra.
std::vector<int32_t> offsets(const std::vector<int64_t>& lengths, int32_t extra) {
  std::vector<int32_t> sums{0};
  for (int64_t length : lengths)
    sums.push_back(sums.back() + static_cast<int32_t>(num_chunks(length, kChunkSize)) + extra);
  return sums;
}

}  // namespace

int64_t cumsum_block(int64_t num_v_heads_local) {
  if (num_v_heads_local < 1 || num_v_heads_local > kMaxCumsumHeads) {
    throw UnsupportedError(c10::str("[build_chunk_metadata] num_v_heads_local: expected 1..", kMaxCumsumHeads, ", got ",
                                    num_v_heads_local));
  }
  const uint64_t block = (uint64_t{1} << 18) / static_cast<uint64_t>(num_v_heads_local * kChunkSize);
  return static_cast<int64_t>(std::bit_ceil(std::max<uint64_t>(1, block)));
}

ChunkMetadataHost build_chunk_metadata_host(const std::vector<int64_t>& lengths, int64_t num_v_heads_local,
                                            SequenceIds ids) {
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw RangeError(c10::str("[build_chunk_metadata] lengths: expected values >= 0, got ", lengths[i], " at ", i));
    }
  }
  ChunkMetadataHost host;
  host.chunk_indices_chunk64 = index_rows(lengths, kChunkSize, ids);
  host.chunk_offsets_chunk64 = offsets(lengths, 0);
  host.update_chunk_offsets_chunk64 = offsets(lengths, 1);
  for (size_t i = 0; i < lengths.size(); ++i) {
    host.final_chunk_indices_chunk64.push_back(host.update_chunk_offsets_chunk64[i + 1] - 1);
  }
  host.chunk_indices_large_block = index_rows(lengths, kLargeBlock, ids);
  host.block_indices_cumsum = index_rows(lengths, cumsum_block(num_v_heads_local), ids);
  return host;
}

ChunkMetadata build_chunk_metadata(const std::vector<int64_t>& lengths, int64_t num_v_heads_local, SequenceIds ids) {
  const ChunkMetadataHost host = build_chunk_metadata_host(lengths, num_v_heads_local, ids);
  const std::vector<const std::vector<int32_t>*> tables = {
      &host.chunk_indices_chunk64,       &host.chunk_offsets_chunk64,     &host.update_chunk_offsets_chunk64,
      &host.final_chunk_indices_chunk64, &host.chunk_indices_large_block, &host.block_indices_cumsum};
  int64_t total = 0;
  for (const auto* table : tables) total += static_cast<int64_t>(table->size());
  const at::Tensor arena = at::empty({total}, at::kInt);
  int64_t at_row = 0;
  const auto place = [&](const std::vector<int32_t>& table) {
    at::Tensor view = arena.narrow(0, at_row, static_cast<int64_t>(table.size()));
    std::copy(table.begin(), table.end(), view.data_ptr<int32_t>());
    at_row += static_cast<int64_t>(table.size());
    return view;
  };
  return {.chunk_indices_chunk64 = place(host.chunk_indices_chunk64).view({-1, 2}),
          .chunk_offsets_chunk64 = place(host.chunk_offsets_chunk64),
          .update_chunk_offsets_chunk64 = place(host.update_chunk_offsets_chunk64),
          .final_chunk_indices_chunk64 = place(host.final_chunk_indices_chunk64),
          .chunk_indices_large_block = place(host.chunk_indices_large_block).view({-1, 2}),
          .block_indices_cumsum = place(host.block_indices_cumsum).view({-1, 2})};
}

}  // namespace xgdn::kernel
