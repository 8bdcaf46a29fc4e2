# SPDX-License-Identifier: Apache-2.0
"""Programs in processes of their own that share one start of Python and of what they all import."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Forks before anything is asked of the modules, so that threads are each child's own. A program ends as scripts do.
_START = """
import importlib, json, os, sys
for module in sys.argv[1:]:
    globals()[module] = importlib.import_module(module)
for line in sys.stdin:
    folder, program, environment = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
            os.dup2(os.open(f"{folder}/{stream}", mode), stream)
        os.environ.clear()
        os.environ.update(environment)
        exec(program)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def run_one(
    program: str, environment: Mapping[str, str], *, seconds: float = 60, modules: tuple[str, ...] = ("torch", "xgdn")
) -> Ended:
    """Run a program that finds `modules` imported and has these variables alone."""
    process = _started(modules)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, str(number)) for number in range(3)]
        for stream in streams:
            stream.touch()
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([folder, program, dict(environment)]), file=process.stdin, flush=True)
        has_ended = select.select([process.stdout], [], [], seconds)[0]
        status = process.stdout.readline() if has_ended else ""
        _, stdout, stderr = (stream.read_text() for stream in streams)
        if not has_ended:
            _end(process)
            raise subprocess.TimeoutExpired(program, seconds, stdout, stderr)
    return Ended(int(status), stdout, stderr)


def run(programs: Sequence[tuple[str, Mapping[str, str]]], seconds: float = 60) -> list[Ended]:
    """Run each program in turn, with these variables beside those of this process."""
    return [run_one(program, {**os.environ, **variables}, seconds=seconds) for program, variables in programs]


@functools.cache
def _started(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    """End it with the programs that it runs."""
    _started.cache_clear()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
