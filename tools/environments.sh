#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the C++ and Python tests with fewer instructions, and with other numbers of threads, than the machine has, and
# prints a table. A variation that this processor cannot run is listed with the reason. Fails when a run failed.
# Usage: tools/environments.sh list | BUILD_DIR [VARIATION...] [-- arguments of pytest]
#   no VARIATION: all of them; "list" prints their names
#   After "--": other arguments than "tests/py", for example "-- tests/py/test_ops_attention.py -x".
# Logs: BUILD_DIR/environments/<variation>.log
set -euo pipefail
cd "$(dirname "$0")/.."

# Name, the flag of /proc/cpuinfo that it needs ("-": none), variables.
readonly variations="
default               -            XGDN_CPU_ISA=
aten-default          -            ATEN_CPU_CAPABILITY=default
aten-avx2             avx2         ATEN_CPU_CAPABILITY=avx2
aten-avx512           avx512f      ATEN_CPU_CAPABILITY=avx512
mkl-compatible        -            MKL_CBWR=COMPATIBLE
mkl-avx2              avx2         MKL_CBWR=AVX2
mkl-avx512            avx512f      MKL_CBWR=AVX512
onednn-sse41          sse4_1       ONEDNN_MAX_CPU_ISA=SSE41
onednn-avx2           avx2         ONEDNN_MAX_CPU_ISA=AVX2
onednn-avx512         avx512f      ONEDNN_MAX_CPU_ISA=AVX512_CORE
onednn-avx512-bf16    avx512_bf16  ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
libraries-oldest      sse4_1       ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
xgdn-sse4             -            XGDN_CPU_ISA=sse4
xgdn-avx2             avx2         XGDN_CPU_ISA=avx2
xgdn-avx512           avx512f      XGDN_CPU_ISA=avx512
xgdn-avx512-bf16      avx512_bf16  XGDN_CPU_ISA=avx512_bf16
xgdn-amx              amx_bf16     XGDN_CPU_ISA=amx
threads-1             -            OMP_NUM_THREADS=1
threads-2             -            OMP_NUM_THREADS=2
threads-3             -            OMP_NUM_THREADS=3
threads-4             -            OMP_NUM_THREADS=4
"

usage() {
  sed -n '3,10s/^# //p' "$0" >&2
  exit 2
}

lines() { sed '/^$/d' <<<"$variations"; }

[[ $# -ge 1 ]] || usage
[[ "$1" != list ]] || { lines | cut -d' ' -f1; exit; }
build="$(realpath "$1")"
readonly build
shift
chosen=()
while [[ $# -gt 0 && "$1" != -- ]]; do
  lines | grep -q "^$1 " || { echo "environments: no variation '$1'; 'list' names them" >&2; exit 2; }
  chosen+=("$1")
  shift
done
[[ $# -eq 0 ]] || shift
tests=("$@")
[[ ${#tests[@]} -gt 0 ]] || tests=(tests/py)
readonly logs="$build/environments"
mkdir -p "$logs"

# counts LOG WORD: the number before WORD in pytest's last line.
counts() { { tail -n 1 "$1" | grep -oE "[0-9]+ $2" || echo 0; } | cut -d' ' -f1; }

# gtests PATTERN: how many lines of the C++ tests' reports have it.
gtests() { cat "$build"/gtest/*.xml 2>/dev/null | grep -c "$1" || true; }

row() { printf '%-20s %-12s %7s %7s %8s %9s  %s\n' "$@"; }

failures=0
row variation suite passed failed skipped seconds result
while read -r name flag settings; do
  if [[ ${#chosen[@]} -gt 0 && " ${chosen[*]} " != *" $name "* ]]; then continue; fi
  if [[ "$flag" != - ]] && ! grep -qw "$flag" /proc/cpuinfo; then
    row "$name" - - - - - "not run: this processor has no $flag"
    continue
  fi
  read -ra variables <<<"$settings"
  log="$logs/$name.ctest.log"
  rm -rf "$build/gtest"
  begin=$SECONDS
  result=ok
  env "${variables[@]}" ctest --test-dir "$build" -j 1 --output-on-failure </dev/null >"$log" 2>&1 || { result="failed: $log"; failures=$((failures + 1)); }
  if [[ "$result" == ok && "$(gtests 'result="completed"')" == 0 ]]; then
    result="failed: no C++ test ran"
    failures=$((failures + 1))
  fi
  row "$name" ctest "$(gtests 'result="completed"')" "$(gtests '<failure')" "$(gtests 'result="skipped"')" \
    "$((SECONDS - begin))" "$result"

  log="$logs/$name.pytest.log"
  begin=$SECONDS
  result=ok
  env "${variables[@]}" python -m pytest -q -p no:cacheprovider "${tests[@]}" </dev/null >"$log" 2>&1 || { result="failed: $log"; failures=$((failures + 1)); }
  row "$name" pytest "$(counts "$log" passed)" "$(($(counts "$log" failed) + $(counts "$log" error)))" "$(counts "$log" skipped)" "$((SECONDS - begin))" "$result"
done < <(lines)
[[ $failures -eq 0 ]] || { echo "$failures runs failed"; exit 1; }
