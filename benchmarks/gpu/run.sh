#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh --part build-test|sanitize|ops|model [--out DIR] [--model DIR] [-- ARGUMENTS of ops.py or model.py]
#
# One part of the work on a machine with an NVIDIA GPU, nvcc and torch for CUDA, each within ten minutes. build-test comes
# first: it installs xgdn into the Python of PYTHON (default python3). Figures are left in DIR (default build/gpu) as JSON.
set -euo pipefail
cd "$(dirname "$0")/../.."

part="" out=build/gpu model=""
while [ $# -gt 0 ]; do
  case $1 in
    --part) part=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --model) model=$2; shift 2 ;;
    --) shift; break ;;
    *) echo "run.sh: unknown argument $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}
export PYTHONPATH="benchmarks:tests/py${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"

# Tests skip where the backend cannot serve; here that is a failure.
require_cuda() {
  "$python" - << 'PY'
import sys, xgdn
if "cuda" not in xgdn.available_backends():
    sys.exit(next(f"no cuda backend: {row.why_not}" for row in xgdn.doctor() if row.backend == "cuda"))
PY
}

build_test() {
  "$python" -m pip install -q --no-build-isolation --no-deps \
    --config-settings=build-dir=build/gpu-cmake --config-settings=cmake.define.XGDN_CUDA=ON .
  require_cuda
  "$python" -m pytest -q tests/cuda --strict-skips
}

# Every kernel at small sizes: all ops of the samples, decode at every key dim, prompts by tensor cores, prompts in
# pieces, replay states at every key dim, in order, moved and forked, prompts on them in parts, attention of decodes and
# of prompts, experts, rows in int8, replayed graphs.
SELECTED='writes_what_the_reference_writes or captured_decode_step or captured_call or verification_writes
  or (TestOp and (1+2+1 or materialised or forks or leaves_its_slots or (any_schedule and K128 and bf16-1)))
  or (bits_that_it_has_alone and 3-torch.float32) or (goes_on_from_any_ring and bf16-16 and not state_bf16)
  or (test_decode_matches and 1+2+1) or (test_prefill_matches and (130+5 or 67+3)) or a_sequence_of_a_prefill
  or (a_cut_sequence_has_the_bits and True and (0+4200+0 or 4500+4096))
  or (attention_is_the_formula and True and (1of1+1of15 or 8of8+9of9 or 65of300))
  or (experts_are_the_formula and (T9 or T40)) or (tokens_are_stored and D20 and int8)'
TOOLS=${TOOLS:-memcheck racecheck initcheck synccheck}
TOOL_SECONDS=${TOOL_SECONDS:-480}

# What is left out, and why:
# - errors that calls of the CUDA API return: torch asks for features and takes an error for "no";
# - racecheck and synccheck of kernels that are not xgdn's: cuBLAS's and ATen's are not ours to mend, and take long;
# - what initcheck finds in kernels that are not xgdn's: ATen copies and compares tensors of which tests left parts
#   unwritten on purpose. They must be watched all the same, since they write what xgdn's kernels read.
sanitize() {
  require_cuda
  # Tensors get allocations of their own, so that the tools see where each ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local failed=0 tool tools=()
  for tool in $TOOLS; do  # all at once: most of a tool's time is one core's
    run_tool "$tool" & tools+=($!)
  done
  for tool in "${tools[@]}"; do wait "$tool" || failed=1; done
  return $failed
}

# run_tool NAME: says what it found; fails if that is anything.
run_tool() {
  local tool=$1 log="$out/$1.txt" filter=() status=0
  case $tool in racecheck | synccheck) filter=(--kernel-regex kns=xgdn) ;; esac
  timeout "$TOOL_SECONDS" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 --print-limit 1000 \
    --show-backtrace no --report-api-errors no "${filter[@]}" \
    "$python" -m pytest -q -p no:cacheprovider -p no:faulthandler --timeout 0 tests/cuda -k "$(echo $SELECTED)" \
    > "$log" 2>&1 || status=$?
  echo "$tool: $(grep -E '[0-9]+ (passed|failed)' "$log" | tail -1), $(grep -E 'SUMMARY' "$log" | tail -1)"
  if [ $status = 0 ]; then return 0; fi
  if [ $status = 9 ] && [ "$tool" = initcheck ] && ! grep -qE '^=+ +at .*xgdn::' "$log"; then
    echo "initcheck: none of them in a kernel of xgdn's"
    return 0
  fi
  echo "$tool: exit status $status, see $log"
  grep -E '^=+ +at |^FAILED' "$log" | cut -c1-160 | sort | uniq -c | sort -rn | head -10 || true
  return 1
}

# A checkpoint of the shape of Qwen3.5-0.8B with random weights, unless --model names one.
random_model() {
  if [ -z "$model" ]; then
    model=$out/model
    [ -e "$model/model.safetensors" ] || "$python" benchmarks/random_checkpoint.py "$model"
  fi
}

case $part in
  build-test) build_test ;;
  sanitize) sanitize ;;
  ops) require_cuda && "$python" -m gpu.ops --json "$out/ops.json" "$@" ;;
  model) require_cuda && random_model && "$python" -m gpu.model "$model" --json "$out/model.json" "$@" ;;
  *) echo "run.sh: expected --part build-test|sanitize|ops|model, got '$part'" >&2; exit 2 ;;
esac
