#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds examples/xllm_adapter over the installed package and runs its tests on the CPU, in a program without Python, and
# on npu tensors, above the emulated CANN of tests/ascend. Where there is no torch_npu wheel that half is skipped, with
# the reason.
# Usage: tests/xllm_adapter/run.sh BUILD_DIR [arguments of gtest]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/ascend/emulation.sh
build="$1"
shift
mkdir -p "$build/xllm_adapter"
work="$(realpath "$build")/xllm_adapter"

quietly "$work/configure.log" cmake -S tests/xllm_adapter -B "$work" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$(python -c 'import pathlib, xgdn; print(pathlib.Path(xgdn.__file__).parent)')"
quietly "$work/build.log" cmake --build "$work"
if ldd "$work/xllm_adapter_test_cpu" | grep -i libpython; then
  echo "tests/xllm_adapter: the program loads Python" >&2
  exit 1
fi
export OMP_WAIT_POLICY=PASSIVE  # threads that wait for each other sleep instead of spinning
"$work/xllm_adapter_test_cpu" --gtest_brief=1 "$@"

reason="$(why_no_emulation)"
if [[ -n "$reason" ]]; then
  echo "tests/xllm_adapter: not on npu tensors: $reason"
  python tests/py/allowed_skips.py --reason "$reason"
  exit
fi
prepare_emulation "$build"
python tests/xllm_adapter/on_npu.py "$work/libxllm_adapter_test.so" --gtest_brief=1 "$@"
