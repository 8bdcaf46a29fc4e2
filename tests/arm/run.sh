#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The CPU kernels on Arm (NEON, SVE with vectors of 128, 256 and 512 bits), cross-compiled and run under an emulator.
# Skips with a sentence where a tool is missing. Needs, on Debian: g++-aarch64-linux-gnu qemu-user libhwy-dev.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
  echo "Arm kernel tests skipped: $1"
  exit 0
}

compiler=${XGDN_ARM_CXX:-aarch64-linux-gnu-g++}
emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || skip "there is no qemu-aarch64"
command -v "$compiler" >/dev/null || skip "there is no $compiler"
highway=${XGDN_HIGHWAY_INCLUDE:-/usr/include}
[[ -f $highway/hwy/highway.h ]] || skip "there is no hwy/highway.h in $highway (XGDN_HIGHWAY_INCLUDE names its folder)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Highway's folder alone: what else is beside it belongs to the host.
mkdir "$work/include"
ln -s "$highway/hwy" "$work/include/hwy"
mapfile -t kernels < <(printf '%s\n' core/kernels/cpu/*.cpp | grep -v /cpu_backend.cpp)

build() {  # name, architecture; one instruction set, known to the compiler: needs nothing of Highway's library
  "$compiler" -std=c++20 -O2 -Wall -Wextra -Werror -static -march="$2" -DHWY_COMPILE_ONLY_STATIC -I. \
    -isystem "$work/include" tests/targets/cpu_kernels.cpp "${kernels[@]}" -o "$work/$1"
}

build neon armv8-a+crypto
"$emulator" -cpu max "$work/neon"
build sve armv8.2-a+sve
for bits in 128 256 512; do
  echo "vectors of $bits bits:"
  "$emulator" -cpu "max,sve$bits=on,sve-default-vector-length=$((bits / 8))" "$work/sve"
done
echo "Arm kernel tests passed"
