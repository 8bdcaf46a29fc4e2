#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests the Ascend backend without an Ascend device: the unmodified torch_npu wheel above an emulated CANN
# (emulation.sh). Where there is no wheel the tests are skipped, with the reason.
# Usage: tests/ascend/run.sh BUILD_DIR [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/../.."
source tests/ascend/emulation.sh
reason="$(why_no_emulation)"
if [[ -n "$reason" ]]; then
  echo "tests/ascend: skipped: $reason"
  python tests/py/allowed_skips.py --reason "$reason"
  exit
fi
prepare_emulation "$1"
shift
export PYTHONPATH="$PYTHONPATH:$PWD/tests/ascend:$PWD/tests/py"
python -m pytest tests/ascend --strict-skips "$@"
# What differs on an Ascend 950 above a CANN that takes fp32 states; the kind of device is the process's.
if [[ $# == 0 ]]; then
  EMULATED_CANN_SOC=Ascend950PR_9589 EMULATED_CANN_FP32_STATE=1 python -m pytest --strict-skips tests/ascend/test_ascend950.py
fi
