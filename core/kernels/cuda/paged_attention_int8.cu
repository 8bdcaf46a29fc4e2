// SPDX-License-Identifier: Apache-2.0
// Paged attention over rows of int8 codes.
#include "core/kernels/cuda/paged_attention_launch.cuh"

namespace xgdn::kernel::cuda {

template void attend<true>(const PagedAttentionArgs&, cudaStream_t);

}  // namespace xgdn::kernel::cuda
