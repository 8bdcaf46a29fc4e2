// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/paged_attention.h"

#include <ATen/ops/ones.h>
#include <c10/util/StringUtil.h>

#include <cmath>
#include <map>
#include <mutex>

#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {
namespace {

constexpr int64_t kMaskSize = 2048;
constexpr int64_t kMaxRows = 1 << 20;   // tokens, and rows of contexts, in one call
constexpr size_t kMaxSequences = 1024;  // in one call
constexpr int64_t kAttentionMaxHeads = 256;
constexpr int64_t kAttentionMaxHeadDim = 768;

// Of a sequence.
struct SequenceLengths {
  int64_t num_tokens, context;
};

std::vector<SequenceLengths> sequence_lengths(const HostFacts& host) {
  const int32_t* cu = host.cu_seqlens->const_data_ptr<int32_t>();
  const int32_t* contexts = host.context_lens->const_data_ptr<int32_t>();
  std::vector<SequenceLengths> lengths;
  for (int64_t n = 0; n < host.context_lens->numel(); ++n) lengths.push_back({cu[n + 1] - cu[n], contexts[n]});
  return lengths;
}

// Padding has a context of no rows.
bool is_padding(const SequenceLengths& s) {
  return s.context == 0 && s.num_tokens > 0;
}

// Neighbouring sequences that one call takes, or neighbouring padding.
struct Group {
  int64_t token_begin = 0;
  int64_t context_begin = 0;
  std::vector<int64_t> token_ends;    // from token_begin
  std::vector<int64_t> context_ends;  // from context_begin
  bool is_padded = false;

  bool has_room(const SequenceLengths& s) const {
    return is_padded == is_padding(s) && token_ends.size() < kMaxSequences && num_tokens() + s.num_tokens <= kMaxRows &&
           num_rows() + s.context <= kMaxRows;
  }
  void add(const SequenceLengths& s) {
    token_ends.push_back(num_tokens() + s.num_tokens);
    context_ends.push_back(num_rows() + s.context);
  }
  int64_t num_tokens() const { return token_ends.empty() ? 0 : token_ends.back(); }
  int64_t num_rows() const { return context_ends.empty() ? 0 : context_ends.back(); }
};

std::vector<Group> groups(const std::vector<SequenceLengths>& sequences) {
  std::vector<Group> all(1);
  for (const SequenceLengths& s : sequences) {
    if (!all.back().has_room(s)) {
      const Group& full = all.back();
      all.push_back({.token_begin = full.token_begin + full.num_tokens(),
                     .context_begin = full.context_begin + full.num_rows(),
                     .is_padded = is_padding(s)});
    }
    all.back().add(s);
  }
  return all;
}

}  // namespace

at::Tensor causal_mask(c10::Device device) {
  static std::mutex mutex;
  static std::map<int, at::Tensor> masks;
  const std::lock_guard lock(mutex);
  at::Tensor& mask = masks[device.index()];
  if (!mask.defined()) {
    mask = at::ones({kMaskSize, kMaskSize}, at::TensorOptions().dtype(at::kBool).device(device)).triu(1);
  }
  return mask;
}

std::optional<std::string> why_not_cache(at::ScalarType tokens, at::ScalarType cache) {
  if (cache == tokens) return std::nullopt;
  return c10::str("it takes keys and values of the dtype of the tokens, ", c10::toString(tokens), ", not ",
                  c10::toString(cache));
}

std::optional<std::string> why_not_attention(const PagedAttentionParams& p, const AttentionShape& s) {
  if (const std::string& sentence = capabilities().why_not_attention; !sentence.empty()) return sentence;
  if (auto sentence = why_not_cache(p.q.scalar_type(), p.k.scalar_type())) return sentence;
  if (s.HQ > kAttentionMaxHeads || s.D > kAttentionMaxHeadDim) {
    return c10::str("the attention op takes at most ", kAttentionMaxHeads, " query heads of at most ",
                    kAttentionMaxHeadDim, ", got HQ=", s.HQ, " D=", s.D);
  }
  if (!p.context_rows) return "it reads all sequences at once, so it needs their rows in the cache: pass context_rows";
  if (!p.host.cu_seqlens || !p.host.context_lens) {
    return "its op takes lengths from the host: pass cu_seqlens_cpu and context_lens_cpu";
  }
  for (const SequenceLengths& lengths : sequence_lengths(p.host)) {
    if (lengths.context > kMaxRows) {
      return c10::str("the attention op takes contexts of at most ", kMaxRows, " tokens, got ", lengths.context);
    }
  }
  return std::nullopt;
}

void run_attention(const PagedAttentionParams& p, const AttentionShape& s) {
  const at::Tensor q = p.q.contiguous();
  for (const Group& group : groups(sequence_lengths(p.host))) {
    if (group.num_tokens() == 0) continue;
    if (group.is_padded) {
      p.out.narrow(0, group.token_begin, group.num_tokens()).zero_();
      continue;
    }
    const at::Tensor rows = p.context_rows->narrow(0, group.context_begin, group.num_rows());
    const at::Tensor out = attention({.q = q.narrow(0, group.token_begin, group.num_tokens()),
                                      .k = p.k.flatten(0, 1).index_select(0, rows),
                                      .v = p.v.flatten(0, 1).index_select(0, rows),
                                      .mask = causal_mask(p.q.device()),
                                      .token_ends = group.token_ends,
                                      .context_ends = group.context_ends,
                                      .scale = p.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.D)))});
    p.out.narrow(0, group.token_begin, group.num_tokens()).copy_(out);
  }
}

}  // namespace xgdn::kernel::npu
