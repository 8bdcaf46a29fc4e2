# SPDX-License-Identifier: Apache-2.0
"""Processes of one group, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


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
