// SPDX-License-Identifier: Apache-2.0
#include "chunk_metadata.h"

#include "sequences.h"

namespace xllm::kernel::gdn {

using ::xgdn::kernel::ChunkMetadata, ::xgdn::kernel::SequenceIds;

ChunkMetadata chunked_prefill_metadata(const at::Tensor& cu_seqlens_cpu, int64_t num_value_heads,
                                       int64_t tensor_parallel_size, SequenceIds ids, at::Device device) {
  const char* op = "chunked_prefill_metadata";
  expect<::xgdn::ShapeError>(tensor_parallel_size > 0 && num_value_heads % tensor_parallel_size == 0, op,
                             "num_value_heads", c10::str("a multiple of ", tensor_parallel_size, " ranks"),
                             num_value_heads);
  expect<::xgdn::DeviceError>(cu_seqlens_cpu.is_cpu(), op, "cu_seqlens_cpu", "a tensor on the host",
                              cu_seqlens_cpu.device());
  const at::ScalarType index_type = cu_seqlens_cpu.scalar_type();
  expect<::xgdn::DtypeError>(index_type == at::kInt || index_type == at::kLong, op, "cu_seqlens_cpu", "int32 or int64",
                             index_type);
  const at::Tensor offsets = cu_seqlens_cpu.to(at::kLong).contiguous();
  expect<::xgdn::ShapeError>(offsets.dim() == 1 && offsets.numel() > 0, op, "cu_seqlens_cpu", "[N+1]",
                             cu_seqlens_cpu.sizes());
  std::vector<int64_t> lengths;
  const int64_t* first = offsets.const_data_ptr<int64_t>();
  for (int64_t n = 0; n + 1 < offsets.numel(); ++n) lengths.push_back(first[n + 1] - first[n]);
  ChunkMetadata m = ::xgdn::kernel::build_chunk_metadata(lengths, num_value_heads / tensor_parallel_size, ids, device);
  for (at::Tensor* table : {&m.chunk_indices_chunk64, &m.chunk_indices_large_block, &m.block_indices_cumsum})
    *table = table->to(index_type);
  for (at::Tensor* sums : {&m.chunk_offsets_chunk64, &m.update_chunk_offsets_chunk64, &m.final_chunk_indices_chunk64})
    *sums = sums->to(at::kLong);
  return m;
}

}  // namespace xllm::kernel::gdn
