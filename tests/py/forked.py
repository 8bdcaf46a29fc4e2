# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own that share one start of Python, torch and xgdn."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Forks before anything is asked of torch or xgdn, so that threads are each child's own. A program ends as scripts do.
_START = """
import json, os, sys, torch, xgdn
folder, programs = json.load(sys.stdin)
for number, (program, environment) in enumerate(programs):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        os.environ.update(environment)
        exec(program)
        sys.exit()
    with open(f"{folder}/{number}.status", "w") as status:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=status)
"""


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def run(programs: Sequence[tuple[str, Mapping[str, str]]], seconds: float = 60) -> list[Ended]:
    """Run each program in turn, with these variables beside those of this process."""
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([folder, programs])
        subprocess.run([sys.executable, "-c", _START], input=given, text=True, check=True, timeout=seconds)
        parts = [[Path(folder, f"{n}.{part}").read_text() for part in ("status", 1, 2)] for n in range(len(programs))]
    return [Ended(int(status), stdout, stderr) for status, stdout, stderr in parts]
