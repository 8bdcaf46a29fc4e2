// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/cuda/graph.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace xgdn::kernel::cuda {
namespace {

class CudaGraph final : public DeviceGraph {
 public:
  // A stream of its own: the default one cannot be captured. Other threads may go on allocating meanwhile.
  explicit CudaGraph(const std::function<void()>& launches) {
    const c10::cuda::CUDAStream outer = c10::cuda::getCurrentCUDAStream();
    outer.synchronize();
    const c10::cuda::CUDAStreamGuard guard(
        c10::cuda::getStreamFromPool(/*isHighPriority=*/false, outer.device_index()));
    graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    try {
      launches();
    } catch (...) {
      graph_.capture_end();
      throw;
    }
    graph_.capture_end();
  }

  void replay() override { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
};

}  // namespace

std::unique_ptr<DeviceGraph> record_graph(const std::function<void()>& launches) {
  return std::make_unique<CudaGraph>(launches);
}

}  // namespace xgdn::kernel::cuda
