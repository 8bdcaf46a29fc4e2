// SPDX-License-Identifier: Apache-2.0
// The values inside index tensors, for callers that did not make them.
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/op_checks.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {
namespace {

class IndexChecker {
 public:
  explicit IndexChecker(std::string_view op) : op_(op) {}

  void cu_seqlens(const at::Tensor& t, int64_t num_tokens) const {
    const int32_t* v = t.data_ptr<int32_t>();
    const int64_t n = t.numel();
    if (v[0] != 0) fail("cu_seqlens", "to start at 0", v[0], 0);
    for (int64_t i = 1; i < n; ++i) {
      if (v[i] < v[i - 1]) fail("cu_seqlens", c10::str("values that never fall (", v[i - 1], " before)"), v[i], i);
    }
    if (v[n - 1] != num_tokens) fail("cu_seqlens", c10::str("to end at T=", num_tokens), v[n - 1], n - 1);
  }

  void lengths(const at::Tensor& cu_seqlens, std::string_view limit, int64_t most) const {
    const int32_t* cu = cu_seqlens.data_ptr<int32_t>();
    for (int64_t n = 0; n + 1 < cu_seqlens.numel(); ++n) {
      const int64_t length = cu[n + 1] - cu[n];
      if (length > most) fail("cu_seqlens", c10::str("sequences of at most ", limit, "=", most, " tokens"), length, n);
    }
  }

  void slots(std::string_view arg, const at::Tensor& t, int64_t num_slots) const {
    range(arg, t, kPadSlot, num_slots - 1, c10::str("a slot 0..", num_slots - 1, " or ", kPadSlot, " for padding"));
  }

  void range(std::string_view arg, const at::Tensor& t, int64_t low, int64_t high, const std::string& what) const {
    if (t.scalar_type() == at::kLong) return range_of<int64_t>(arg, t, low, high, what);
    range_of<int32_t>(arg, t, low, high, what);
  }

  void range_of_ones(std::string_view arg, const at::Tensor& t) const {
    const int32_t* v = t.data_ptr<int32_t>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (v[i] != i) fail(arg, "0, 1, ..., N: one token a sequence", v[i], i);
    }
  }

  // No slot may be written twice, nor written by one sequence and read by another.
  void writes(std::string_view arg, const at::Tensor& writes, std::string_view reads_arg, const at::Tensor& reads,
              int64_t num_slots) const {
    const int32_t* r = reads.data_ptr<int32_t>();
    const int32_t* w = writes.data_ptr<int32_t>();
    std::vector<int64_t> writer(static_cast<size_t>(num_slots), -1);
    for (int64_t i = 0; i < writes.numel(); ++i) {
      if (w[i] == kPadSlot || r[i] == kPadSlot) continue;
      if (writer[w[i]] >= 0)
        fail(arg, c10::str("each slot to be written once (row ", writer[w[i]], " writes it too)"), w[i], i);
      writer[w[i]] = i;
    }
    for (int64_t i = 0; i < reads.numel(); ++i) {
      if (r[i] == kPadSlot) continue;
      const int64_t other = writer[r[i]];
      if (other >= 0 && other != i) {
        fail(reads_arg, c10::str("a slot that no other row writes (row ", other, " does)"), r[i], i);
      }
    }
  }

  [[noreturn]] void fail(std::string_view arg, const std::string& expected, int64_t got, int64_t index) const {
    throw RangeError(c10::str("[", op_, "] ", arg, ": expected ", expected, ", got ", got, " at index ", index));
  }

 private:
  template <typename Index>
  void range_of(std::string_view arg, const at::Tensor& t, int64_t low, int64_t high, const std::string& what) const {
    const Index* v = t.const_data_ptr<Index>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      if (v[i] < low || v[i] > high) fail(arg, what, v[i], i);
    }
  }

  std::string_view op_;
};

template <typename Params>
void check_pool_indices(const IndexChecker& c, const Params& p, int64_t num_slots) {
  c.slots("state_indices", p.state_indices, num_slots);
  if (p.write_indices) c.slots("write_indices", *p.write_indices, num_slots);
  c.writes(p.write_indices ? "write_indices" : "state_indices", p.write_indices.value_or(p.state_indices),
           "state_indices", p.state_indices, num_slots);
}

// Every entry of a verification table belongs to one sequence.
void check_table(const IndexChecker& c, const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  c.slots("state_indices", p.state_indices, s.S);
  c.range("num_accepted", *p.num_accepted, 1, s.L, c10::str("1..L=", s.L));
  c.lengths(p.cu_seqlens, "L", s.L);
  const int32_t* table = p.state_indices.data_ptr<int32_t>();
  std::vector<bool> taken(static_cast<size_t>(s.S), false);
  for (int64_t i = 0; i < s.N * s.L; ++i) {
    if (table[i] == kPadSlot) continue;
    if (taken[table[i]]) c.fail("state_indices", "each slot once in the table", table[i], i);
    taken[table[i]] = true;
  }
}

}  // namespace

void check_indices(const RecurrentGatedDeltaRuleParams& p) {
  const GdnShape s = checked_shape(p);
  const IndexChecker c(Op<RecurrentGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  if (p.num_accepted) {
    check_table(c, p, s);
  } else {
    check_pool_indices(c, p, s.S);
  }
}

void check_indices(const ChunkGatedDeltaRuleParams& p) {
  const GdnShape s = checked_shape(p);
  const IndexChecker c(Op<ChunkGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
  const int32_t* cu = p.cu_seqlens.data_ptr<int32_t>();
  const int32_t* offsets = p.chunk_offsets.data_ptr<int32_t>();
  if (offsets[0] != 0) c.fail("chunk_offsets", "to start at 0", offsets[0], 0);
  for (int64_t n = 0; n < s.N; ++n) {
    const int64_t chunks = (cu[n + 1] - cu[n] + kChunkSize - 1) / kChunkSize;
    if (offsets[n + 1] - offsets[n] != chunks) {
      c.fail("chunk_offsets",
             c10::str("a step of ", chunks, " chunks for the ", cu[n + 1] - cu[n], " tokens in cu_seqlens"),
             offsets[n + 1] - offsets[n], n + 1);
    }
  }
  if (offsets[s.N] != p.chunk_indices.size(0)) {
    c.fail("chunk_offsets", c10::str("to end at the ", p.chunk_indices.size(0), " rows of chunk_indices"), offsets[s.N],
           s.N);
  }
}

void check_indices(const PackedDecodeParams& p) {
  check_pool_indices(IndexChecker(Op<PackedDecodeParams>::name), p, checked_shape(p).S);
}

void check_indices(const GdnDecodeStepParams& p) {
  const DecodeStepShape s = checked_shape(p);
  const IndexChecker c(Op<GdnDecodeStepParams>::name);
  check_pool_indices(c, p, s.rule.S);
  const at::Tensor reads = p.conv_indices.value_or(p.state_indices);
  const at::Tensor writes = p.write_indices.value_or(reads);
  c.slots("conv_indices", reads, s.conv.S);
  c.slots("write_indices", writes, s.conv.S);
  c.writes("conv_indices", writes, "conv_indices", reads, s.conv.S);
  for (int64_t n = 0; n < s.rule.N; ++n) {
    const int32_t slot = reads.data_ptr<int32_t>()[n];
    if ((slot == kPadSlot) != (p.state_indices.data_ptr<int32_t>()[n] == kPadSlot)) {
      c.fail("conv_indices", "a slot exactly where state_indices has one", slot, n);
    }
  }
  if (p.cu_seqlens) c.range_of_ones("cu_seqlens", *p.cu_seqlens);
}

void check_indices(const CausalConv1dParams& p) {
  const ConvShape s = checked_shape(p);
  const IndexChecker c(Op<CausalConv1dParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
}

void check_indices(const CausalConv1dUpdateParams& p) {
  const ConvShape s = checked_shape(p);
  const IndexChecker c(Op<CausalConv1dUpdateParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
  const int64_t most = s.R - s.W + 2;  // rows 0..R-1 hold the history of at most this many acceptance counts
  if (p.num_accepted) c.range("num_accepted", *p.num_accepted, 1, most, c10::str("1..", most));
  c.lengths(p.cu_seqlens, "max_len", p.max_len);
}

void check_indices(const PagedAttentionParams& p) {
  checked_shape(p);
  const IndexChecker c(Op<PagedAttentionParams>::name);
  const int64_t blocks = p.k.size(0);
  const int64_t rows = blocks * p.k.size(1);
  c.range("block_ids", p.block_ids, 0, blocks - 1, c10::str("0..", blocks - 1));
  if (p.context_rows) c.range("context_rows", *p.context_rows, 0, rows - 1, c10::str("0..", rows - 1));
}

void check_indices(const MoeExpertsParams& p) {
  const ExpertsShape s = checked_shape(p);
  const IndexChecker c(Op<MoeExpertsParams>::name);
  c.range("chosen", p.chosen, 0, s.E - 1, c10::str("an expert 0..", s.E - 1));
}

}  // namespace xgdn::kernel
