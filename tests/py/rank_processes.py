# SPDX-License-Identifier: Apache-2.0
"""Processes of one group, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import xgdn

SECONDS_AFTER_A_KILL = 10.0  # within which everything has ended after a rank has


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(world: int, program: Path, *args: str | Path) -> dict[str, Any]:
    """Rank 0's document, the last line that it prints, when all processes have ended well.

    Ranks that outnumber the cores take turns on one: to wake an idle core costs more than most of their messages.
    """
    cores = os.sched_getaffinity(0)
    variables = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(program), *map(str, args)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        if world > len(cores):
            for process in processes:
                os.sched_setaffinity(process.pid, {min(cores)})
        output, _ = processes[0].communicate(timeout=150)
        assert [process.wait(timeout=20) for process in processes] == [0] * world
    finally:
        for process in processes:
            process.kill()
            process.wait()
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def expect_errors_after_a_kill(engine: xgdn.Engine) -> int:
    """Kills the other one of two ranks between steps: every request ends with a typed error, in time. The process
    that was the rank is returned.
    """
    rank = engine.rank_process_ids[-1]
    ids = [engine.submit(xgdn.Request([1, 2, 3], max_new_tokens=1000, ignore_eos=True)) for _ in range(3)]
    for _ in range(4):
        engine.step()
    os.kill(rank, signal.SIGKILL)
    began = time.monotonic()
    errors = {}
    while not engine.is_idle():
        errors |= {event.id: event.error for event in engine.step() if event.error}
    assert time.monotonic() - began < SECONDS_AFTER_A_KILL
    assert sorted(errors) == ids
    assert all("expected all 2 ranks to compute, got one that failed" in error for error in errors.values())
    return rank
