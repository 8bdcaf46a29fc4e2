# SPDX-License-Identifier: Apache-2.0
"""A server process, and what its model says, for clients in environments of their own.

Only the interpreter that XGDN_PYTHON names has xgdn. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("XGDN_PYTHON", sys.executable)
KEY = "the key"
# In seconds: the least pause after a refusal that says `Retry-After: 1`, seen by who polls the server's counters.
# The clients' own first pauses are at most half a second.
PAUSE = 0.8


class Reference:
    """The engine without a server: texts that a request must give."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        modules = os.pathsep.join([str(ROOT / "tests/py"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [PYTHON, str(ROOT / "tests/clients/reference.py"), str(model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": modules},
        )
        self.tokens_of("")  # from now on there is the model's folder

    def want(self, prompt: str | list[int], count: int = 16, **sampling: Any) -> str:
        """The text of `count` tokens after the prompt."""
        return str(self._call("want", prompt, count, **sampling))

    def chat(self, content: str, count: int = 16, **sampling: Any) -> str:
        """The answer to a user's only message."""
        return self.want(f"# user: {content}\n# assistant:", count, **sampling)

    def tokens_of(self, prompt: str) -> list[int]:
        ids: list[int] = self._call("tokens_of", prompt)
        return ids

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments, options]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@dataclass(frozen=True)
class Server:
    """`xgdn serve` as its users start it."""

    address: str

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """A sample by its name as /metrics has it, labels included; 0 before there is one."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(f"xgdn_{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0

    def is_at_rest(self) -> bool:
        gauges = ("slots_used", "kv_blocks_used", "requests_running", "requests_waiting")
        return all(self.metric(name) == 0 for name in gauges)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "did not come true"
            time.sleep(0.01)

    @contextmanager
    def left(self) -> Iterator[None]:
        """What runs inside leaves one answer before its end: its sequence is cancelled, and frees what it held."""
        cancelled = 'finished_total{reason="cancelled"}'
        before = self.metric(cancelled)
        yield
        self.wait_until(lambda: self.metric(cancelled) == before + 1)
        self.wait_until(self.is_at_rest)

    def num_refusals(self) -> float:
        return self.metric('errors_total{type="queue_full"}')

    @contextmanager
    def busy(self) -> Iterator[Callable[[], None]]:
        """One sequence runs until the function is called, or to the end."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        body = {"model": "tiny", "prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        answer.readline()

        def leave() -> None:
            answer.close()
            connection.close()

        try:
            yield leave
        finally:
            leave()
            self.wait_until(self.is_at_rest)

    @contextmanager
    def busy_once(self) -> Iterator[Callable[[], float]]:
        """One sequence runs until a client has been refused. The function returns the seconds since then."""
        before = self.num_refusals()
        refused_at = math.inf

        def wait(leave: Callable[[], None]) -> None:
            nonlocal refused_at
            self.wait_until(lambda: self.num_refusals() > before, 60)
            refused_at = time.monotonic()
            leave()

        with self.busy() as leave:
            waiting = threading.Thread(target=wait, args=(leave,))
            waiting.start()
            yield lambda: time.monotonic() - refused_at
            waiting.join()
        assert self.num_refusals() == before + 1


@contextmanager
def serve(model_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Server]]:
    """The process, which must end without a failure, and the server in it."""
    command = [PYTHON, "-m", "xgdn", "serve", str(model_dir), "--port", "0", "--json", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--model-name", "tiny", "--api-key", KEY, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        yield process, Server(json.loads(process.stdout.readline())["address"])
    finally:
        process.terminate()
        assert process.wait(60) == 0
