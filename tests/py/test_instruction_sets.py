# SPDX-License-Identifier: Apache-2.0
"""The tests of the cpu backend's kernels again, with fewer instructions than the machine has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import xgdn

FILES = ("test_ops_chunk.py", "test_ops_linear.py", "test_ops_pointwise.py", "test_ops_attention.py")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have one path")
@pytest.mark.skipif("cpu" not in xgdn.available_backends(), reason="this build has no cpu backend")
@pytest.mark.parametrize("instruction_set", ["sse4", "avx2", "avx512", "avx512_bf16"])
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
