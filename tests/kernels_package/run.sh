#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the repository of layers in the package `kernels` and in a version of transformers that takes it, in an
# environment of its own under build/kernels, with the wheel of a build tree.
# Usage: tests/kernels_package/run.sh BUILD_DIR [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
build="$(realpath "$1")"
readonly build
readonly work="$PWD/build/kernels"
readonly pins=tests/kernels_package/requirements.txt

if ! cmp -s "$pins" "$work/pins"; then
  echo "tests/kernels_package: installing"
  rm -rf "$work"
  python -m venv "$work/environment"
  "$work/environment/bin/python" -m pip install -q --requirement "$pins"
  cp "$pins" "$work/pins"
fi
rm -rf "$work/dist"
python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work/dist" --config-settings=build-dir="$build" .
"$work/environment/bin/python" -m pip install -q --force-reinstall --no-deps "$work"/dist/xgdn-*.whl
# benchmarks/ has a package of that name, too.
"$work/environment/bin/python" -m pytest -q -o pythonpath=tests/py --disable-warnings --timeout 600 tests/kernels_package "${@:2}"
