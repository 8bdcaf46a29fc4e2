#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the C++ tests, the kernels on every instruction set, and calls of every op from Python under sanitizers.
# Usage: tools/sanitize.sh [address] [thread]     (default: both, one after the other)
#   address  AddressSanitizer with UndefinedBehaviorSanitizer, C++ and Python
#   thread   ThreadSanitizer, C++ only, with one OpenMP thread: it does not see how OpenMP's own threads wait for each
#            other. No Python: torch and the interpreter are not instrumented, and reports about them drown ours.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"
readonly root
readonly smoke=(tests/py/test_batch_invariance.py tests/py/test_chunk_metadata.py tests/py/test_ops_errors.py)

# compile NAME SANITIZERS [OPTIONS of CMake]: the C++ tests in build/NAME.
compile() {
  local name="$1" sanitizers="$2"
  shift 2
  cmake -S . -B "build/$name" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DXGDN_BUILD_TESTS=ON \
    -DXGDN_SANITIZE="$sanitizers" "$@"
  cmake --build "build/$name"
}

# ctests NAME: without randomised addresses, which old sanitizers do not expect on a new kernel.
ctests() { setarch --addr-no-randomize ctest --test-dir "build/$1" --output-on-failure --timeout 1200; }

address() {
  # Allocations of torch and the interpreter at exit are no leaks of ours.
  export ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1
  compile cpu-asan address,undefined -DXGDN_BUILD_PYTHON=ON
  ctests cpu-asan
  # The installed package with the sanitized libraries; the sanitizers come first in the process.
  rm -rf build/cpu-asan/site
  mkdir build/cpu-asan/site
  cp -r python/xgdn build/cpu-asan/site/
  cmake --install build/cpu-asan --component python --prefix build/cpu-asan/site/xgdn
  cmake --install build/cpu-asan --component devel --prefix build/cpu-asan/site/xgdn
  LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)" \
    LD_LIBRARY_PATH="$(python -c 'import torch; print(torch.__path__[0])')/lib:$root/build/cpu-asan/site/xgdn/lib" \
    PYTHONPATH="$root/build/cpu-asan/site" setarch --addr-no-randomize \
    python -m pytest -q -p no:cacheprovider -o timeout=1200 -o faulthandler_timeout=1500 "${smoke[@]}"
}

thread() {
  compile cpu-tsan thread
  OMP_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1 ctests cpu-tsan
}

[[ $# -gt 0 ]] || set -- address thread
for sanitizer in "$@"; do
  case "$sanitizer" in
    address | thread) "$sanitizer" ;;
    *) echo "sanitize: expected address or thread, got '$sanitizer'" >&2 && exit 2 ;;
  esac
done
