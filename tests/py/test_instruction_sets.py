# SPDX-License-Identifier: Apache-2.0
"""The tests of the cpu backend's kernels again, with fewer instructions than the machine has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_ops_chunk.py", "test_ops_linear.py", "test_ops_pointwise.py", "test_ops_attention.py")

# In ascending order, with the flag of the processor that each needs.
INSTRUCTION_SETS = {
    "sse4": "sse4_1",
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
}


def fewer() -> list[str]:
    """Those below the best one that this processor has: the other tests run with that."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags][:-1]


def test_x86_64_has_an_instruction_set_to_leave_out() -> None:
    assert bool(fewer()) == (platform.machine() == "x86_64")


@pytest.mark.parametrize("instruction_set", fewer())
def test_every_instruction_set(instruction_set: str) -> None:
    """In a process that may use no more than `instruction_set`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not [reference", *FILES]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "XGDN_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
