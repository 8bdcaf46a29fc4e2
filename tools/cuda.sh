#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cuda.sh: compiles the CUDA kernels and their backend, as the preset `cuda` does but in half the time, without most
# optimisations: nobody runs the result. That takes nvcc but neither a GPU nor a torch for CUDA. Says so and ends well
# where there is no nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc="${CUDACXX:-$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc || true)}"
if [[ -z "$nvcc" ]]; then
  echo "skipped: the CUDA kernels, no nvcc here (name it with CUDACXX)"
  exit 0
fi
[[ -z "${CMAKE_CXX_COMPILER_LAUNCHER:-}" ]] || export CMAKE_CUDA_COMPILER_LAUNCHER="$CMAKE_CXX_COMPILER_LAUNCHER"
export CUDACXX="$nvcc"
mkdir -p build
cmake --preset cuda -B build/cuda-check -DCMAKE_CUDA_FLAGS="-Xcicc -O1 -Xptxas -O0" > build/cuda-configure.txt ||
  { cat build/cuda-configure.txt; exit 1; }
cmake --build build/cuda-check --target xgdn_cuda_kernels core/CMakeFiles/xgdn_kernels.dir/kernels/cuda/cuda_backend.cpp.o
