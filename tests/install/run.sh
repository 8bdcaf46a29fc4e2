#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests both ways to install xgdn, from a build tree with Python bindings (make package):
#   1. cmake --install into an empty prefix: the consumer program finds it, runs, and holds no Python; the installed
#      headers compile; the CMake package names no file of this machine and no private dependency; the server of
#      examples/embed_server is built against it and answers over HTTP (test_embed_server.py).
#   2. the wheel: it holds all that it should; the same program builds against the unpacked folder.
# Usage: tests/install/run.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
build="$(realpath "$1")"
readonly build
work="$(mktemp -d)"
readonly work
trap 'rm -rf "$work"' EXIT
torch_dir="$(python -c 'import torch; print(torch.__path__[0])')"
readonly torch_dir
readonly prompt=(5 6 7 8 9)
expected="$(python tests/install/tiny_model.py "$work/model" "${prompt[@]}" 2>"$work/model.log")" || { cat "$work/model.log"; exit 1; }
readonly expected
passed=0

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

pass() {
  echo "ok: $*"
  passed=$((passed + 1))
}

# build_example NAME EXAMPLE PREFIX_PATH LIBRARY: builds examples/EXAMPLE, which must load LIBRARY and no Python.
build_example() {
  local name="$1" example="$2" prefix_path="$3" library="$4" linked
  cmake -G Ninja -S "examples/$example" -B "$work/$name" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_PREFIX_PATH="$prefix_path" >"$work/$name.log" 2>&1 || { cat "$work/$name.log"; fail "$name: cmake"; }
  cmake --build "$work/$name" >"$work/$name.log" 2>&1 || { cat "$work/$name.log"; fail "$name: build"; }
  linked="$(ldd "$work/$name/$example")"
  grep -qF "=> $library " <<<"$linked" || fail "$name: loads another libxgdn than $library: $linked"
  ! grep -qi libpython <<<"$linked" || fail "$name: libpython is loaded: $linked"
  ! grep -q 'not found' <<<"$linked" || fail "$name: unresolved libraries: $linked"
}

# consumer NAME PREFIX_PATH LIBRARY: builds and runs examples/consumer.
consumer() {
  local name="$1" prefix_path="$2" library="$3"
  build_example "$name" consumer "$prefix_path" "$library"
  "$work/$name/consumer" || fail "$name: the program failed"
  [[ "$(xargs <<<"$("$work/$name/consumer" "$work/model" "${prompt[@]}")")" == "$expected" ]] ||
    fail "$name: the engine generates other tokens than transformers ($expected)"
  pass "$name: a C++ program finds, links and runs xgdn without Python, and generates what transformers does"
}

# embed_server NAME PREFIX_PATH LIBRARY: builds examples/embed_server and asks it over HTTP.
embed_server() {
  local name="$1" prefix_path="$2" library="$3"
  build_example "$name" embed_server "$prefix_path" "$library"
  python -m pytest -q tests/install --strict-skips --server "$work/$name/embed_server" --model "$work/model" \
    --prompt "${prompt[*]}" --expected "$expected" || fail "$name: the lines above"
  pass "$name: a C++ server serves concurrent clients over HTTP, without Python"
}

# package_is_clean NAME CMAKE_DIR: the CMake package names targets, not files of this machine or private dependencies.
package_is_clean() {
  ! grep -rnE '(hwy|nlohmann|OpenMP|"/[a-z]|;/)' "$2"/xgdnTargets*.cmake || fail "$1: the CMake package leaks the lines above"
  pass "$1: the CMake package leaks no path and no private dependency"
}

# headers_compile NAME INCLUDE_DIR: no installed header needs one that is not installed.
headers_compile() {
  (cd "$2" && find . -name '*.h' | sort | sed 's|^./\(.*\)$|#include "\1"|') >"$work/headers.cpp"
  g++ -std=c++20 -fsyntax-only -I"$2" -isystem "$torch_dir/include" -isystem "$torch_dir/include/torch/csrc/api/include" \
    "$work/headers.cpp" || fail "$1: the headers do not compile"
  pass "$1: $(wc -l <"$work/headers.cpp") headers compile"
}

prefix="$work/prefix"
cmake -DXGDN_TORCH_RPATH="$torch_dir/lib" "$build" >"$work/configure.log" 2>&1 || { cat "$work/configure.log"; fail configure; }
cmake --build "$build" --target xgdn >/dev/null
cmake --install "$build" --component devel --prefix "$prefix" >/dev/null
for file in lib/libxgdn.so include/xgdn/core/errors.h include/xgdn/core/kernels/ops_api.h \
  include/xgdn/core/layers/qwen3_gated_delta_net.h lib/cmake/xgdn/xgdnConfig.cmake; do
  [[ -f "$prefix/$file" ]] || fail "cmake --install: $file is missing"
done
[[ ! -e "$prefix/include/xgdn/core/kernels/backend.h" ]] || fail "cmake --install: backend.h is private"
[[ -z "$(find "$prefix" -name '_C*')" ]] || fail "cmake --install: Python files among component devel"
package_is_clean "cmake --install" "$prefix/lib/cmake/xgdn"
headers_compile "cmake --install" "$prefix/include/xgdn"
prefix_path="$prefix;$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
consumer prefix "$prefix_path" "$prefix/lib/libxgdn.so"
embed_server server "$prefix_path" "$prefix/lib/libxgdn.so"

python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work/dist" --config-settings=build-dir="$build" .
# Unpacked beside torch, as in site-packages.
python -m zipfile -e "$work"/dist/xgdn-*.whl "$work/site"
ln -s "$torch_dir" "$work/site/torch"
wheel="$work/site/xgdn"
page=$(cd python/xgdn && ls server/page/*)
for file in py.typed __init__.py _C.pyi $page lib/libxgdn.so include/xgdn/core/kernels/ops_api.h \
  lib/cmake/xgdn/xgdnConfig.cmake lib/cmake/xgdn/xgdnTargets.cmake; do
  [[ -f "$wheel/$file" ]] || fail "wheel: $file is missing"
done
compgen -G "$wheel/_C.*.so" >/dev/null || fail "wheel: the extension module _C is missing"
[[ -z "$(find "$work/site" -name '*gtest*' -o -name '*_test')" ]] || fail "wheel: test programs are inside"
for library in "$wheel"/_C.*.so "$wheel"/lib/libxgdn.so; do
  run_path="$(readelf -d "$library" | sed -n 's/.*R.*PATH.*\[\(.*\)\]$/\1/p')"
  [[ "$run_path" =~ ^\$ORIGIN(/[^:]*)?(:\$ORIGIN(/[^:]*)?)*$ ]] ||
    fail "wheel: $(basename "$library") looks for libraries in $run_path"
done
pass "wheel: extension module, library, headers, CMake package, stub, marker and the server's page are inside"
package_is_clean wheel "$wheel/lib/cmake/xgdn"
consumer wheel "$wheel" "$wheel/lib/libxgdn.so"

echo "$passed passed, 0 failed"
