// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/chunk_metadata.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "core/kernels/dispatch/dims.h"

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

// The most rows that an index table of `chunk` can have.
int64_t max_rows(int64_t max_sequences, int64_t max_tokens, int64_t chunk) {
  return max_sequences + max_tokens / chunk;
}

at::Tensor num_chunks(const at::Tensor& lengths, int64_t chunk) {
  return (lengths + (chunk - 1)).floor_divide(chunk);
}

// Row r belongs to the first sequence whose chunks end behind it.
void write_index_rows(const at::Tensor& lengths, int64_t chunk, const at::Tensor& table) {
  const at::Tensor counts = num_chunks(lengths, chunk);
  const at::Tensor ends = counts.cumsum(0);
  const at::Tensor row = at::arange(table.size(0), ends.options());
  const at::Tensor sequence = at::searchsorted(ends, row, /*out_int32=*/false, /*right=*/true);
  const at::Tensor known = sequence.clamp_max(lengths.size(0) - 1);
  const at::Tensor chunk_of_sequence = row - (ends - counts).index_select(0, known);
  const at::Tensor is_row = sequence.lt(lengths.size(0)).unsqueeze(1);
  table.copy_(at::where(is_row, at::stack({known, chunk_of_sequence}, 1), at::full({}, -1, ends.options())));
}

// 0, then the running sum of n_i(64) + extra.
void write_offsets(const at::Tensor& lengths, int64_t extra, const at::Tensor& table) {
  const at::Tensor sums = (num_chunks(lengths, kChunkSize) + extra).cumsum(0);
  const int64_t N = lengths.size(0);
  table.narrow(0, 0, 1).zero_();
  table.narrow(0, 1, N).copy_(sums);
  table.slice(0, N + 1).copy_(sums.narrow(0, N - 1, 1).expand({table.size(0) - N - 1}));
}

void check_count(std::string_view where, std::string_view what, int64_t least, int64_t got) {
  if (got >= least && got <= kMaxIndex) return;
  throw RangeError(c10::str("[", where, "] ", what, ": expected ", least, "..", kMaxIndex, ", got ", got));
}

// Every table holds int32: the last offset, which counts chunks and sequences, and tokens as cu_seqlens does.
void check_lengths(const std::vector<int64_t>& lengths) {
  auto sum = static_cast<int64_t>(lengths.size());
  check_count("build_chunk_metadata", "lengths: number of sequences", 0, sum);
  for (size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw RangeError(c10::str("[build_chunk_metadata] lengths: expected values >= 0, got ", lengths[i], " at ", i));
    }
    if (lengths[i] > kMaxIndex - sum) {
      throw RangeError(c10::str("[build_chunk_metadata] lengths: expected at most ", kMaxIndex,
                                " tokens and sequences together, got ", lengths[i], " at ", i, " beside ", sum));
    }
    sum += lengths[i];
  }
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

ChunkTables build_chunk_tables(const std::vector<int64_t>& lengths, SequenceIds ids) {
  check_lengths(lengths);
  return {.indices = index_rows(lengths, kChunkSize, ids), .offsets = offsets(lengths, 0)};
}

ChunkMetadata build_chunk_metadata(const std::vector<int64_t>& lengths, int64_t num_v_heads_local, SequenceIds ids,
                                   c10::Device device) {
  const int64_t block = cumsum_block(num_v_heads_local);
  const auto [indices, ends] = build_chunk_tables(lengths, ids);
  const std::vector<int32_t> update_ends = offsets(lengths, 1);
  std::vector<int32_t> final_indices(lengths.size());
  std::transform(update_ends.begin() + 1, update_ends.end(), final_indices.begin(),
                 [](int32_t end) { return end - 1; });
  const std::vector<int32_t> large = index_rows(lengths, kLargeBlock, ids);
  const std::vector<int32_t> cumsum = index_rows(lengths, block, ids);
  const std::vector<const std::vector<int32_t>*> tables = {&indices,       &ends,  &update_ends,
                                                           &final_indices, &large, &cumsum};
  int64_t total = 0;
  for (const auto* table : tables) total += static_cast<int64_t>(table->size());
  const at::Tensor host_arena = at::empty({total}, at::kInt);
  auto* end = host_arena.mutable_data_ptr<int32_t>();
  for (const auto* table : tables) end = std::copy(table->begin(), table->end(), end);
  const at::Tensor arena = host_arena.to(device);
  int64_t begin = 0;
  const auto place = [&](const std::vector<int32_t>& table) {
    const auto size = static_cast<int64_t>(table.size());
    return arena.narrow(0, std::exchange(begin, begin + size), size);
  };
  return {.chunk_indices_chunk64 = place(indices).view({-1, 2}),
          .chunk_offsets_chunk64 = place(ends),
          .update_chunk_offsets_chunk64 = place(update_ends),
          .final_chunk_indices_chunk64 = place(final_indices),
          .chunk_indices_large_block = place(large).view({-1, 2}),
          .block_indices_cumsum = place(cumsum).view({-1, 2})};
}

ChunkMetadata allocate_chunk_metadata(int64_t max_sequences, int64_t max_tokens, int64_t num_v_heads_local,
                                      c10::Device device) {
  check_count("allocate_chunk_metadata", "max_sequences", 0, max_sequences);
  check_count("allocate_chunk_metadata", "max_tokens", 0, max_tokens);
  check_count("allocate_chunk_metadata", "max_sequences and max_tokens together", 0, max_sequences + max_tokens);
  const at::TensorOptions options = at::TensorOptions().dtype(at::kInt).device(device);
  const auto index_table = [&](int64_t chunk) {
    return at::empty({max_rows(max_sequences, max_tokens, chunk), 2}, options);
  };
  return {.chunk_indices_chunk64 = index_table(kChunkSize),
          .chunk_offsets_chunk64 = at::empty({max_sequences + 1}, options),
          .update_chunk_offsets_chunk64 = at::empty({max_sequences + 1}, options),
          .final_chunk_indices_chunk64 = at::empty({max_sequences}, options),
          .chunk_indices_large_block = index_table(kLargeBlock),
          .block_indices_cumsum = index_table(cumsum_block(num_v_heads_local))};
}

void write_chunk_metadata(const at::Tensor& cu_seqlens, int64_t num_v_heads_local, const ChunkMetadata& tables) {
  Dims d("write_chunk_metadata");
  const auto table = [&](std::string_view arg, const at::Tensor& t, std::string_view names) {
    d.match(arg, t, names).dtype(arg, t, {at::kInt}).contiguous(arg, t);
    if (arg != "cu_seqlens") d.written(arg);
  };
  table("cu_seqlens", cu_seqlens, "N+1");
  table("final_chunk_indices_chunk64", tables.final_chunk_indices_chunk64, "max_sequences");
  d.bind("max_sequences+1", d.sym("max_sequences") + 1, "final_chunk_indices_chunk64");
  table("chunk_offsets_chunk64", tables.chunk_offsets_chunk64, "max_sequences+1");
  table("update_chunk_offsets_chunk64", tables.update_chunk_offsets_chunk64, "max_sequences+1");
  table("chunk_indices_chunk64", tables.chunk_indices_chunk64, "M 2");
  table("chunk_indices_large_block", tables.chunk_indices_large_block, "M_large 2");
  table("block_indices_cumsum", tables.block_indices_cumsum, "M_cumsum 2");
  d.check_written();

  const int64_t N = cu_seqlens.size(0) - 1;
  const int64_t max_sequences = tables.final_chunk_indices_chunk64.size(0);
  if (N < 1 || N > max_sequences) {
    throw ShapeError(c10::str("[write_chunk_metadata] cu_seqlens: expected 1..", max_sequences,
                              " sequences (set by the tables), got ", N));
  }
  const at::Tensor cu = cu_seqlens.to(at::kLong);
  const at::Tensor lengths = cu.slice(0, 1) - cu.slice(0, 0, -1);
  write_index_rows(lengths, kChunkSize, tables.chunk_indices_chunk64);
  write_index_rows(lengths, kLargeBlock, tables.chunk_indices_large_block);
  write_index_rows(lengths, cumsum_block(num_v_heads_local), tables.block_indices_cumsum);
  write_offsets(lengths, 0, tables.chunk_offsets_chunk64);
  write_offsets(lengths, 1, tables.update_chunk_offsets_chunk64);
  tables.final_chunk_indices_chunk64.narrow(0, 0, N).copy_(tables.update_chunk_offsets_chunk64.narrow(0, 1, N) - 1);
  tables.final_chunk_indices_chunk64.slice(0, N).fill_(-1);
}

}  // namespace xgdn::kernel
