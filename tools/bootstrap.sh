#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Prepares this checkout: system packages (installed by root on Debian and Ubuntu, else named), the virtual environment
# .venv, and the pinned Python packages of requirements/<test|dev>.txt.
# Usage: tools/bootstrap.sh [test|dev|browser]; "browser" prepares a Chromium for the tests of the server's page, no more.
#   PYTHON              the interpreter that makes the environment (python3)
#   TORCH_INSTALL_ARGS  further arguments of `pip install torch`, for example another package index
set -euo pipefail
cd "$(dirname "$0")/.."
readonly requirements="requirements/${1:-test}.txt"
readonly python="${PYTHON:-python3}"

fail() {
  echo "xgdn: $*" >&2
  exit 1
}

has_header() { echo "#include <$1>" | g++ -std=c++20 -E -x c++ - >/dev/null 2>&1; }

missing_packages() {
  local include
  include="$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')"
  command -v g++ >/dev/null || echo g++
  has_header gtest/gtest.h || echo libgtest-dev
  has_header hwy/highway.h || echo libhwy-dev
  has_header nlohmann/json.hpp || echo nlohmann-json3-dev
  has_header httplib.h || echo libcpp-httplib-dev
  command -v pkg-config >/dev/null || echo pkg-config
  [[ -f "$include/Python.h" ]] || echo python3-dev
  "$python" -c 'import ensurepip' 2>/dev/null || echo python3-venv
}

has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null

missing_browser() { has_browser || echo chromium; }

# install_system_packages MISSING: until the function MISSING names no package any more.
install_system_packages() {
  local packages
  mapfile -t packages < <("$1")
  if [[ ${#packages[@]} -eq 0 ]]; then return; fi
  if ! command -v apt-get >/dev/null; then
    fail "install the counterparts of these Debian packages first: ${packages[*]}."
  elif [[ "$(id -u)" -ne 0 ]]; then
    fail "system packages are missing; install them with: sudo apt-get install ${packages[*]}"
  fi
  echo "xgdn: installing ${packages[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  # A compiler that has just come may lack headers that could not be looked for before.
  mapfile -t packages < <("$1")
  [[ ${#packages[@]} -eq 0 ]] || fail "still missing after apt-get install: ${packages[*]}."
}

has_cmake() {
  command -v cmake >/dev/null &&
    printf '3.25\n%s\n' "$(cmake --version | sed -n 's/^cmake version \([0-9.]*\).*/\1/p')" | sort -C -V
}

if [[ "${1:-}" == browser ]]; then
  install_system_packages missing_browser
  exit
fi
command -v "$python" >/dev/null || fail "no '$python' here; name an interpreter with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "the pinned test environment needs Python 3.11 or later, '$python' is $("$python" -V); name another with PYTHON=..."
install_system_packages missing_packages
[[ -x .venv/bin/python ]] || "$python" -m venv .venv

export PATH="$PWD/.venv/bin:$PATH"
# Python compiles a module when it is first imported; most of torch's and transformers' never are.
pip_install=(python -m pip install -q --no-compile)
has_cmake || "${pip_install[@]}" "cmake>=3.25,<4"
# By itself: the other packages must find torch in place, or they fetch another build of it.
# shellcheck disable=SC2086
"${pip_install[@]}" torch==2.13.0 --constraint "$requirements" ${TORCH_INSTALL_ARGS:-}
"${pip_install[@]}" -r "$requirements"
