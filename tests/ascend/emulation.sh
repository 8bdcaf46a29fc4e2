# SPDX-License-Identifier: Apache-2.0
# Sourced: the unmodified torch_npu wheel above the emulated CANN, made under BUILD_DIR/ascend, away from the Python
# environment, so that `import torch` elsewhere does not load it. Suites that run side by side share it.
#   why_no_emulation             prints the reason where there is no wheel
#   prepare_emulation BUILD_DIR  builds what is not there, and sets the environment for programs above it
readonly torch_npu_version=2.13.0

why_no_emulation() {
  local platform torch
  platform="$(python -c 'import platform, sys; print(f"{sys.platform} {platform.machine()} {sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}")')"
  case "$platform" in
    "linux x86_64 cpython 3.11" | "linux x86_64 cpython 3.12") ;;
    *) echo "no torch_npu $torch_npu_version wheel for $platform"; return ;;
  esac
  torch="$(python -c 'import torch; print(torch.__version__.split("+")[0])')"
  [[ "$torch" == "$torch_npu_version" ]] ||
    echo "torch_npu $torch_npu_version needs torch $torch_npu_version, this is $torch"
}

# quietly LOG COMMAND...: shows the output only if the command fails.
quietly() {
  local log="$1"
  shift
  "$@" >"$log" 2>&1 || { cat "$log"; exit 1; }
}

prepare_emulation() {
  local work site
  mkdir -p "$1/ascend"
  work="$(realpath "$1")/ascend"
  site="$work/site-$torch_npu_version"
  (
    flock 9 || exit 1
    if [[ ! -d "$site" ]]; then
      rm -rf "$site.part"
      quietly "$work/install.log" \
        python -m pip install --no-deps --target "$site.part" "torch_npu==$torch_npu_version"
      mv "$site.part" "$site" || exit 1
    fi
    quietly "$work/configure.log" cmake -S tests/ascend/emulated_cann -B "$work/cann" -G Ninja \
      -DCMAKE_BUILD_TYPE=Release \
      -DTorch_DIR="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')/Torch" \
      -DACL_INCLUDE_DIR="$site/torch_npu/include/third_party/acl/inc"
    quietly "$work/build.log" cmake --build "$work/cann"
  ) 9>"$work/lock" || exit 1

  # Nothing of a CANN that may be installed here. Operators run where they are called, so that an error has its place,
  # and every tensor is an allocation of its own, so that its bounds are known.
  unset ASCEND_HOME_PATH ASCEND_OPP_PATH ASCEND_CUSTOM_OPP_PATH
  export LD_LIBRARY_PATH="$work/cann/lib" PYTHONPATH="$site"
  export TORCH_DEVICE_BACKEND_AUTOLOAD=0 TASK_QUEUE_ENABLE=0 PYTORCH_NO_NPU_MEMORY_CACHING=1
}
