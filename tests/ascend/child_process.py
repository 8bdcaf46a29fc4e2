# SPDX-License-Identifier: Apache-2.0
"""Code in a process of its own, for what happens once per process: a probe, a task queue that has ended."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

import pytest

import forked

# Less than pytest's own timeout: a child that does not come back ends with the stacks of its threads.
SECONDS = 105


def task_queue_environment() -> dict[str, str]:
    """torch_npu's default mode, which the other tests are not in.

    With its cache: without it the error of a task is raised, and lost, where a workspace is freed.
    """
    in_tests_only = ("TASK_QUEUE_ENABLE", "PYTORCH_NO_NPU_MEMORY_CACHING")
    return {name: value for name, value in os.environ.items() if name not in in_tests_only}


def run_python(
    code: str,
    *,
    preamble: str = "import torch, torch_npu",
    environment: Mapping[str, str] = os.environ,
    **switches: str,
) -> list[str]:
    """The lines that the code printed after `preamble` and an import of xgdn, with these switches of the emulation."""
    watched = f"import faulthandler\nfaulthandler.enable()\nfaulthandler.dump_traceback_later({SECONDS}, exit=True)"
    try:
        ended = forked.run_one(
            f"{watched}\n{preamble}\nimport xgdn\nprint('imported')\n{code}",
            {**environment, **{"EMULATED_CANN_" + name: value for name, value in switches.items()}},
            seconds=SECONDS + 8,  # it has then ended without its stacks
            modules=("torch",),
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"{expired}; it printed {expired.stdout!r} and {expired.stderr!r}")
    assert ended.status == 0, ended.stderr
    lines = ended.stdout.splitlines()
    return lines[lines.index("imported") + 1 :]
