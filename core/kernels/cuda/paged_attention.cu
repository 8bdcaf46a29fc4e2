// SPDX-License-Identifier: Apache-2.0
// out = softmax(scale q k^T) v over the rows of the context that a token sees.
#include "core/kernels/cuda/paged_attention.h"

#include <algorithm>

#include "core/kernels/cuda/paged_attention_launch.cuh"

namespace xgdn::kernel::cuda {

size_t workspace_bytes(const PagedAttentionArgs& args) {
  const ChunkResults results = chunk_results(args);
  const int shares = tile_call(args).shares;
  int64_t rows = 0;  // of results; one kernel after another uses the memory
  if (results.max_chunks > 1) rows = args.N * results.max_tokens * args.HQ * results.max_chunks;
  if (shares > 1) rows = std::max(rows, args.T * args.HQ * shares);
  return static_cast<size_t>(rows * (args.D + 1)) * sizeof(float);
}

template void attend<false>(const PagedAttentionArgs&, cudaStream_t);

void paged_attention(const PagedAttentionArgs& args, cudaStream_t stream) {
  if (args.T == 0 || args.N == 0) return;
  args.are_int8 ? attend<true>(args, stream) : attend<false>(args, stream);
}

}  // namespace xgdn::kernel::cuda
