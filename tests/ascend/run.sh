#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the Ascend backend without an Ascend device: the unmodified torch_npu wheel above an emulated CANN.
# Builds the emulation and installs the wheel under BUILD_DIR/ascend, away from the Python environment, so that
# `import torch` elsewhere does not load it. Where there is no wheel the tests are skipped, with the reason.
# Usage: tests/ascend/run.sh BUILD_DIR [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$1/ascend"
work="$(realpath "$1")/ascend"
readonly work
readonly version=2.13.0
readonly site="$work/site-$version"
shift

skip() {
  echo "tests/ascend: skipped: $*"
  python tests/py/allowed_skips.py --reason "$*"
  exit
}

# quietly LOG COMMAND...: shows the output only if the command fails.
quietly() {
  local log="$1"
  shift
  "$@" >"$log" 2>&1 || { cat "$log"; exit 1; }
}

platform="$(python -c 'import platform, sys; print(f"{sys.platform} {platform.machine()} {sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}")')"
case "$platform" in
  "linux x86_64 cpython 3.11" | "linux x86_64 cpython 3.12") ;;
  *) skip "no torch_npu $version wheel for $platform" ;;
esac
torch="$(python -c 'import torch; print(torch.__version__.split("+")[0])')"
[[ "$torch" == "$version" ]] || skip "torch_npu $version needs torch $version, this is $torch"

if [[ ! -d "$site" ]]; then
  rm -rf "$site.part"
  quietly "$work/install.log" python -m pip install --no-deps --target "$site.part" "torch_npu==$version"
  mv "$site.part" "$site"
fi
quietly "$work/configure.log" cmake -S tests/ascend/emulated_cann -B "$work/cann" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DTorch_DIR="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch" \
  -DACL_INCLUDE_DIR="$site/torch_npu/include/third_party/acl/inc"
quietly "$work/build.log" cmake --build "$work/cann"

# Nothing of a CANN that may be installed here. Operators run where they are called, so that an error has its place,
# and every tensor is an allocation of its own, so that its bounds are known.
unset ASCEND_HOME_PATH ASCEND_OPP_PATH ASCEND_CUSTOM_OPP_PATH
export LD_LIBRARY_PATH="$work/cann/lib" PYTHONPATH="$site:$PWD/tests/ascend:$PWD/tests/py"
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 TASK_QUEUE_ENABLE=0 PYTORCH_NO_NPU_MEMORY_CACHING=1
python -m pytest tests/ascend --strict-skips "$@"
# What differs on an Ascend 950 above a CANN that takes fp32 states; the kind of device is the process's.
if [[ $# == 0 ]]; then
  EMULATED_CANN_SOC=Ascend950PR_9589 EMULATED_CANN_FP32_STATE=1 python -m pytest --strict-skips tests/ascend/test_ascend950.py
fi
