# SPDX-License-Identifier: Apache-2.0
"""The processes of an engine that several share: how they start and end, and what is said when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

import xgdn
from live_server import CHECKPOINT, IGNORE_EOS, post, wait_until
from rank_processes import SECONDS_AFTER_A_KILL as SECONDS
from rank_processes import expect_errors_after_a_kill
from serve_process import command


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def followers_of(process_id: int) -> list[int]:
    """Processes that it has started and that follow it."""
    children = Path(f"/proc/{process_id}/task").glob("*/children")
    ids = [int(word) for path in children for word in path.read_text().split()]
    return [i for i in ids if b"xgdn.follower" in Path(f"/proc/{i}/cmdline").read_bytes()]


def test_a_killed_rank_ends_every_request() -> None:
    engine = xgdn.Engine(CHECKPOINT, dtype=torch.float32, tensor_parallel=2)
    failures: list[str] = []
    engine.on_rank_failure(failures.append)
    rank_1 = expect_errors_after_a_kill(engine)
    wait_until(lambda: bool(failures), SECONDS)
    assert f"rank 1 (process {rank_1}) ended with status -9" in failures[0]
    assert "got one that failed" in engine.device_error
    with pytest.raises(xgdn.errors.GenerationError, match="got one that failed"):
        engine.generate([[1]], max_new_tokens=1)
    engine.close()


def test_an_idle_engine_learns_of_a_killed_rank_and_another_takes_its_place() -> None:
    engine = xgdn.Engine(CHECKPOINT, dtype=torch.float32, tensor_parallel=2)
    with pytest.raises(xgdn.errors.RequestError, match="expected a process without a group"):
        xgdn.Engine(CHECKPOINT, dtype=torch.float32, tensor_parallel=2)
    assert engine.generate([[5, 6]], max_new_tokens=4)[0].tokens
    failures: list[str] = []
    engine.on_rank_failure(failures.append)
    os.kill(engine.rank_process_ids[0], signal.SIGKILL)
    wait_until(lambda: bool(failures), SECONDS)
    with pytest.raises(xgdn.errors.GenerationError, match="ended with status -9"):
        engine.generate([[1]], max_new_tokens=1)
    del engine
    alone = xgdn.Engine(CHECKPOINT, dtype=torch.float32).generate([[5, 6]], max_new_tokens=8)[0].tokens
    again = xgdn.Engine(CHECKPOINT, dtype=torch.float32, tensor_parallel=2)
    (rank_1,) = again.rank_process_ids
    assert again.generate([[5, 6]], max_new_tokens=8)[0].tokens == alone
    del again
    wait_until(lambda: not is_alive(rank_1), SECONDS)


PROGRAM = """
import os, signal, sys, torch, xgdn
engine = xgdn.Engine(sys.argv[1], dtype=torch.float32, tensor_parallel=2)
print(engine.rank_process_ids[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_rank_survives_the_first() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(CHECKPOINT)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        rank_1 = int(first.stdout.readline())
        assert first.wait(SECONDS) == -signal.SIGKILL
    wait_until(lambda: not is_alive(rank_1), SECONDS)


def test_serve() -> None:
    """The same text from two ranks; after a rank is killed, an error in the stream and a status that is not zero."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0} | IGNORE_EOS
    with command() as (_, address):
        expected = post(address, body).json()["choices"][0]["text"]
    with command("--tensor-parallel", "2") as (process, address):
        answer = post(address, body).json()
        assert answer["choices"][0]["text"] == expected
        (rank_1,) = followers_of(process.pid)
        long = body | {"max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line).startswith("data: ")
            os.kill(rank_1, signal.SIGKILL)
            killed = time.monotonic()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "got one that failed" in json.dumps(events[-1])
        assert process.wait(SECONDS) == 1
        assert time.monotonic() - killed < SECONDS


def test_commands() -> None:
    arguments = [
        sys.executable,
        "-m",
        "xgdn",
        "generate",
        str(CHECKPOINT),
        "--prompt-ids",
        "1,2,3",
        "--dtype",
        "float32",
    ]
    replies = [
        subprocess.run([*arguments, *options], capture_output=True, text=True, timeout=100)
        for options in ([], ["--tensor-parallel", "2"], ["--tensor-parallel", "7"])
    ]
    assert [reply.returncode for reply in replies] == [0, 0, 1]
    assert replies[0].stdout == replies[1].stdout != ""
    assert "tensor_parallel: expected one of 1, 2" in replies[2].stderr
