# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve` with the example's small model, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from live_server import CHECKPOINT

# Each step takes this long, so that a request of many tokens cannot end before the server does.
SLOW_STEPS = (
    "import time, xgdn; step = xgdn.Engine.step; xgdn.Engine.step = lambda self: (time.sleep({}), step(self))[1]"
)


@contextmanager
def command(
    *options: str, step_seconds: float = 0, stderr: int | IO[str] = subprocess.DEVNULL
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its first address."""
    program = "import sys, torch; torch.set_num_threads(1); from xgdn.cli import app; {}; app(sys.argv[1:])"
    args = ["serve", str(CHECKPOINT), "--port", "0", "--dtype", "float32", "--model-name", "tiny", "--json", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(SLOW_STEPS.format(step_seconds)), *args],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdout is not None
    try:
        document = json.loads(process.stdout.readline())
        assert document["model"] == "tiny"
        yield process, document["address"]
    finally:
        process.kill()
        process.communicate()
