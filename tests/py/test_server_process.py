# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve` as a program: its port, its signals, what it says."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from live_server import (
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    http_get,
    metrics,
    post,
    wait_until,
)
from serve_process import command
from xgdn.cli import app as cli_app
from xgdn.server import serve
from xgdn.server.request_log import logging_config


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """Take back what a command that serves in this process sets: handlers that write to its stderr."""
    loggers = [logging.getLogger(name) for name in logging_config("text")["loggers"]]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)


def test_the_json_document_is_all_of_stdout_and_comes_when_requests_are_taken() -> None:
    with command("--allow-origin", "http://a", "--allow-origin", "http://b") as (process, url):
        for origin in ("http://a", "http://b"):
            answer = http_get(f"{url}/health", headers={"Origin": origin})
            assert answer.status_code == 200
            assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert post(url, GOOD).status_code == 200
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert (rest, process.returncode) == ("", 0)


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    with command("--api-key", KEY, step_seconds=0.02) as (process, url), ThreadPoolExecutor(1) as clients:
        assert http_get(f"{url}/ready").json() == {"status": "ready"}
        running = clients.submit(post, url, GOOD | IGNORE_EOS | {"max_tokens": 200})
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: http_get(f"{url}/ready").status_code == 503)
        assert http_get(f"{url}/ready").json() == {"status": "shutting_down"}
        assert http_get(f"{url}/health").json() == {"status": "ok"}  # or a supervisor would end it
        refused = post(url, GOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
        assert not running.done()
        assert running.result().json()["usage"]["completion_tokens"] == 200
        assert process.wait(60) == 0


def test_sigterm_ends_running_requests_at_the_limit() -> None:
    options = ("--shutdown-seconds", "1", "--api-key", KEY)
    body = GOOD | IGNORE_EOS | {"max_tokens": 8000}  # 400 seconds
    with command(*options, step_seconds=0.05) as (process, url), ThreadPoolExecutor(2) as clients:
        whole, stream = (clients.submit(post, url, body | {"stream": is_stream}) for is_stream in (False, True))
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (500, "engine_error")
        *_, error, done, rest = stream.result().text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server was shut down"
        assert (done, rest) == ("data: [DONE]", "")


def test_a_second_signal_ends_the_wait() -> None:
    with command("--api-key", KEY, step_seconds=0.05) as (process, url), ThreadPoolExecutor(1) as clients:
        running = clients.submit(post, url, GOOD | IGNORE_EOS | {"max_tokens": 8000})
        wait_until(lambda: metrics(url)["xgdn_requests_running"] == 1)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: http_get(f"{url}/ready").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert running.exception() is not None or running.result().status_code == 500


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

        def bind_both(host: str, port: int) -> list[socket.socket]:
            (listener,) = bind(host, port)
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(listener.getsockname())
            other.listen()
            return [listener]

        monkeypatch.setattr(serve, "bind", bind_both)
        result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), "--port", "0"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(": Address already in use")
    assert "Traceback" not in result.stderr


def test_a_host_that_is_none_is_said() -> None:
    for host in ("no such host", "a" * 70 + ".com"):
        result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), "--host", host])
        assert result.exit_code == 1
        assert result.stderr.startswith(f"xgdn: {host}:8000: ")
        assert result.stderr.count("\n") == 1


def test_an_address_of_version_6_is_in_brackets() -> None:
    try:
        (listener,) = serve.bind("::1", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with listener:
        assert serve.address_of(listener) == f"http://[::1]:{listener.getsockname()[1]}"


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Let the name `several` stand for these addresses."""
    getaddrinfo = socket.getaddrinfo

    def resolve(host: str, *args: Any, **options: Any) -> list[Any]:
        names = hosts if host == "several" else (host,)
        return [entry for name in names for entry in getaddrinfo(name, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def has_ipv6() -> bool:
    try:
        serve.bind("::1", 0)[0].close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("hosts", [("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1")], ids=" ".join)
def test_all_addresses_of_a_name_answer_at_one_port(hosts: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "::1" in hosts and not has_ipv6():
        pytest.skip("no IPv6 here")
    resolve_to(monkeypatch, *hosts)
    told: list[Any] = []

    def ask_and_leave(document: str, **_: Any) -> None:
        told.append(json.loads(document))
        threading.Thread(target=ask).start()

    def ask() -> None:
        try:
            told.extend(http_get(f"{address}/health").json() for address in told[0]["addresses"])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(typer, "echo", ask_and_leave)
    arguments = ["serve", str(CHECKPOINT), "--host", "several", "--port", "0", "--dtype", "float32", "--json"]
    CliRunner().invoke(cli_app, arguments, catch_exceptions=False)
    addresses = told[0]["addresses"]
    (port,) = {address.rsplit(":", 1)[1] for address in addresses}
    assert addresses == [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts]
    assert told[0]["address"] == addresses[0]
    assert told[1:] == [{"status": "ok"}] * 2


def ports(listeners: list[socket.socket]) -> list[tuple[str, int]]:
    names = [listener.getsockname()[:2] for listener in listeners]
    for listener in listeners:
        listener.close()
    return names


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_addresses_of_elsewhere_are_left_out(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bind_one = serve._bind_one

    def bind_here(family: int, address: tuple[Any, ...], **options: Any) -> socket.socket:
        if address[0].startswith("192."):  # some systems bind addresses that they do not have
            raise OSError(number, os.strerror(number))
        return bind_one(family, address, **options)

    monkeypatch.setattr(serve, "_bind_one", bind_here)
    resolve_to(monkeypatch, "192.0.2.1", "127.0.0.1", "127.0.0.1", "192.0.2.2")
    ((host, _),) = ports(serve.bind("several", 0))
    assert host == "127.0.0.1"
    with pytest.raises(OSError, match=os.strerror(number)):
        serve.bind("192.0.2.1", 0)


def test_a_port_that_is_taken_at_a_further_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="Address already in use"):
            serve.bind("several", port)
        with socket.create_server(("127.0.0.1", port)):
            pass  # nothing holds on to it

        # As if the kernel's first free port were that one.
        bind_one = serve._bind_one
        asked = []

        def bind_taken_first(family: int, address: tuple[Any, ...], **options: Any) -> socket.socket:
            asked.append(address)
            return bind_one(family, (address[0], port) if len(asked) == 1 else address, **options)

        monkeypatch.setattr(serve, "_bind_one", bind_taken_first)
        (first, one), (second, other) = ports(serve.bind("several", 0))
        assert (first, second) == ("127.0.0.1", "127.0.0.2")
        assert one == other != port
        assert asked[:3] == [("127.0.0.1", 0), ("127.0.0.2", port), ("127.0.0.1", 0)]


def test_both_families_of_every_address_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    resolve_to(monkeypatch, "::", "0.0.0.0")
    listeners = serve.bind("several", 0)
    for listener in listeners:
        listener.listen()
    (_, one), (_, other) = ports(listeners)
    assert one == other
    (both,) = serve.bind("::", 0)  # alone it takes both
    with both:
        both.listen()
        socket.create_connection(("127.0.0.1", both.getsockname()[1]), timeout=5).close()


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
