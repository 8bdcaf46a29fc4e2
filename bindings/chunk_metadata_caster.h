// SPDX-License-Identifier: Apache-2.0
// Chunk metadata is a tuple of six tensors in Python, xgdn.ops.ChunkMetadata, which torch.compile can look into.
#pragma once

#include <nanobind/nanobind.h>

#include "bindings/torch_casters.h"
#include "core/kernels/chunk_metadata.h"

namespace nanobind::detail {

template <>
struct type_caster<xgdn::kernel::ChunkMetadata> {
  // The stub cannot name a class of the package that imports it.
  static constexpr char kTuple[] =
      "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]";
  NB_TYPE_CASTER(xgdn::kernel::ChunkMetadata, const_name(kTuple))

  bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
    at::Tensor* const tables[] = {&value.chunk_indices_chunk64,        &value.chunk_offsets_chunk64,
                                  &value.update_chunk_offsets_chunk64, &value.final_chunk_indices_chunk64,
                                  &value.chunk_indices_large_block,    &value.block_indices_cumsum};
    constexpr Py_ssize_t kCount = std::size(tables);
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != kCount) return false;
    for (Py_ssize_t i = 0; i < kCount; ++i) {
      PyObject* table = PyTuple_GET_ITEM(source.ptr(), i);
      if (!THPVariable_Check(table)) return false;
      *tables[i] = THPVariable_Unpack(table);
    }
    return true;
  }

  static handle from_cpp(const xgdn::kernel::ChunkMetadata& m, rv_policy, cleanup_list*) noexcept {
    try {
      const object type = module_::import_("xgdn.ops").attr("ChunkMetadata");
      return type(m.chunk_indices_chunk64, m.chunk_offsets_chunk64, m.update_chunk_offsets_chunk64,
                  m.final_chunk_indices_chunk64, m.chunk_indices_large_block, m.block_indices_cumsum)
          .release();
    } catch (python_error& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return handle();
  }
};

}  // namespace nanobind::detail
