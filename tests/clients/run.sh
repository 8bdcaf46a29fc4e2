#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests that programs of others work with `xgdn serve`: the client libraries of OpenAI for Python and JavaScript, curl,
# LangChain, LiteLLM, lm-evaluation-harness and schemathesis; and a load of every feature mixed (mixed_load.py). Each that
# is no part of the project's own environment gets one under build/clients, by the pins in requirements/ and javascript/.
# One that the machine cannot run is skipped with the reason.
# Usage: tests/clients/run.sh [CLIENT...] [-- arguments of pytest]; without a CLIENT all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
readonly here=tests/clients
readonly work="$PWD/build/clients"
XGDN_PYTHON="$(command -v python)"
export XGDN_PYTHON

clients=()
while [[ $# -gt 0 && "$1" != -- ]]; do clients+=("$1"); shift; done
[[ $# -eq 0 ]] || shift
[[ ${#clients[@]} -gt 0 ]] || clients=(openai curl javascript langchain litellm lm_eval schemathesis mixed_load)

# prepare NAME FILE COMMAND...: makes the environment NAME by the command, once for each content of the file.
prepare() {
  local folder="$work/$1" pins="$2"
  cmp -s "$pins" "$folder/pins" && return
  echo "tests/clients: installing $1"
  rm -rf "$folder"
  mkdir -p "$folder"
  "${@:3}" "$folder" "$pins" >"$folder/install.log" 2>&1 || { cat "$folder/install.log"; exit 1; }
  cp "$pins" "$folder/pins"
}

python_environment() {
  python -m venv "$1"
  "$1/bin/python" -m pip install --no-deps --requirement "$2"
}

javascript_environment() {
  cp "$2" "$1"
  npm install --prefix "$1" --no-audit --no-fund --no-package-lock
}

failed=()
skipped=()
for client in "${clients[@]}"; do
  interpreter=python
  case "$client" in
    langchain | litellm)
      prepare "$client" "$here/requirements/$client.txt" python_environment
      interpreter="$work/$client/bin/python"
      ;;
    lm_eval | schemathesis) prepare "$client" "$here/requirements/$client.txt" python_environment ;;
    javascript)
      if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        skipped+=("javascript: there is no node and npm")
        continue
      fi
      prepare javascript "$here/javascript/package.json" javascript_environment
      ;;
    curl)
      command -v curl >/dev/null || { skipped+=("curl: there is none"); continue; }
      ;;
  esac
  echo "tests/clients: $client"
  if [[ "$client" == mixed_load ]]; then
    PYTHONPATH="tests/py:benchmarks${PYTHONPATH:+:$PYTHONPATH}" python $here/mixed_load.py || failed+=("$client")
    continue
  fi
  "$interpreter" -m pytest -q --disable-warnings "$here/test_$client.py" --environments "$work" "$@" || failed+=("$client")
done

for reason in "${skipped[@]}"; do echo "tests/clients: skipped: $reason"; done
[[ ${#failed[@]} -eq 0 ]] || { echo "tests/clients: failed: ${failed[*]}"; exit 1; }
echo "tests/clients: passed"
