# SPDX-License-Identifier: Apache-2.0
"""Runs the programs of a comparison. Where one fails, SystemExit says which and shows the end of what it said."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LAST_LINES = 20


def output_of(command: Sequence[object], env: Mapping[str, str] | None = None) -> str:
    """Return what `command` writes to its standard output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        fail(words, done.returncode, done.stderr)
    return done.stdout


def run_logged(command: Sequence[object], log: Path) -> None:
    """Run `command`, all its output appended to `log`."""
    words = [str(word) for word in command]
    with log.open("ab") as out:
        start = out.tell()
        done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        fail(words, done.returncode, log.read_bytes()[start:].decode(errors="replace"), f", see {log}")


def fail(words: Sequence[str], status: int, said: str, where: str = "") -> None:
    end = "\n".join(said.splitlines()[-LAST_LINES:])
    sys.exit(f"`{' '.join(words)}` ended with status {status}{where}:\n{end}")
