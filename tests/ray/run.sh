#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests examples/ray_serve on a local Ray, in an environment of its own under build/ray, with the wheel of a build tree.
# Usage: tests/ray/run.sh BUILD_DIR [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
build="$(realpath "$1")"
readonly build
readonly work="$PWD/build/ray"
readonly python="$work/environment/bin/python"
mkdir -p "$work"

rm -rf "$work/dist"
python -m pip wheel -q --no-build-isolation --no-deps --wheel-dir "$work/dist" --config-settings=build-dir="$build" .
if [[ ! -x "$python" ]]; then
  echo "tests/ray: installing Ray"
  python -m venv "$work/environment"
  # By itself: the other packages must find torch in place, or they fetch another build of it.
  # shellcheck disable=SC2086
  "$python" -m pip install -q torch==2.13.0 ${TORCH_INSTALL_ARGS:-}
fi
"$python" -m pip install -q --no-deps --force-reinstall "$work"/dist/xgdn-*.whl
"$python" -m pip install -q --requirement tests/ray/requirements.txt
"$python" -m pytest -q --disable-warnings tests/ray "${@:2}"
