# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve` as a program: its port, its signals, what it says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from live_server import CHECKPOINT, GOOD, IGNORE_EOS, KEY, metrics, post, wait_until
from xgdn.cli import app as cli_app
from xgdn.server import serve

# Each step takes this long, so that a request of many tokens cannot end before the server does.
SLOW_STEPS = (
    "import time, xgdn; step = xgdn.Engine.step; xgdn.Engine.step = lambda self: (time.sleep({}), step(self))[1]"
)


@contextmanager
def command(*options: str, step_seconds: float = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    program = "import sys, torch; torch.set_num_threads(1); from xgdn.cli import app; {}; app(sys.argv[1:])"
    args = ["serve", str(CHECKPOINT), "--port", "0", "--dtype", "float32", "--model-name", "tiny", "--json", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", program.format(SLOW_STEPS.format(step_seconds)), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
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


def test_the_json_document_is_all_of_stdout_and_comes_when_requests_are_taken() -> None:
    with command() as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        assert post(url, GOOD).status_code == 200
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert (rest, process.returncode) == ("", 0)


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    with command("--api-key", KEY, step_seconds=0.02) as (process, url), ThreadPoolExecutor(1) as clients:
        running = clients.submit(post, url, GOOD | IGNORE_EOS | {"max_tokens": 200})
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(url))
        assert not running.done()
        assert running.result().json()["usage"]["completion_tokens"] == 200
        assert process.wait(60) == 0


def test_sigterm_ends_running_requests_at_the_limit() -> None:
    options = ("--shutdown-seconds", "1", "--api-key", KEY)
    with command(*options, step_seconds=0.05) as (process, url), ThreadPoolExecutor(1) as clients:
        running = clients.submit(post, url, GOOD | IGNORE_EOS | {"max_tokens": 8000})  # 400 seconds
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert isinstance(running.exception(), httpx.HTTPError) or running.result().status_code >= 500


def is_listening(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(CHECKPOINT / "tokenizer.json")  # and no model
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = CliRunner().invoke(cli_app, ["serve", str(tmp_path), "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr == f"xgdn: 127.0.0.1:{port}: Address already in use\n"


def test_a_port_taken_while_the_model_is_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = serve.bind
    with socket.socket() as other:

        def bind_both(host: str, port: int) -> socket.socket:
            listener = bind(host, port)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(listener.getsockname())
            other.listen()
            return listener

        monkeypatch.setattr(serve, "bind", bind_both)
        result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(": Address already in use")
    assert "Traceback" not in result.stderr


def test_a_host_that_is_none_is_said() -> None:
    result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), "--host", "no such host"])
    assert result.exit_code == 1
    assert result.stderr.startswith("xgdn: no such host:8000: ")
    assert result.stderr.count("\n") == 1


def test_an_address_of_version_6_is_in_brackets() -> None:
    try:
        listener = serve.bind("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listener:
        assert serve.address_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_serve_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli_app, ["serve", str(tmp_path)])
    assert result.exit_code == 1
    assert "tokenizer.json is missing" in result.stderr
    for module in [name for name in sys.modules if name.startswith("xgdn.server.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT)])
    assert result.exit_code == 1
    assert "fastapi" in result.stderr
    assert "pip install 'xgdn[serve]'" in result.stderr
    assert result.stderr.count("\n") == 1
