# SPDX-License-Identifier: Apache-2.0
"""What is between `xgdn serve` and its clients: ids, the log, streams that wait, probes, TLS."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from live_server import (
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    QUEUE,
    SLOTS,
    http_get,
    http_post,
    live_stepped,
    metrics,
    post,
    wait_until,
)
from serve_process import command
from xgdn.cli import app as cli_app

HEADERS = {"Authorization": f"Bearer {KEY}"}


def data_of(stream: str) -> list[Any]:
    """The events but the last, which is checked."""
    *events, done, rest = [part for part in stream.split("\n\n") if not part.startswith(":")]
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("options", [{"continuous_usage_stats": True}, {"include_usage": True}, {}], ids=str)
def test_usage_in_a_stream(url: str, options: dict[str, bool]) -> None:
    body = GOOD | IGNORE_EOS | {"prompt": [1, 2, 3], "max_tokens": 6, "n": 2, "stream": True, "stream_options": options}
    events = data_of(post(url, body).text)
    if not options:
        assert not any("usage" in event for event in events)
        return
    assert events[-1]["choices"] == []
    assert (events[-1]["usage"]["prompt_tokens"], events[-1]["usage"]["completion_tokens"]) == (3, 12)
    if options.get("continuous_usage_stats"):
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert 1 <= counts[0] < 12 == counts[-1]
        assert all(event["usage"]["prompt_tokens"] == 3 for event in events)
    else:
        assert {event["usage"] for event in events[:-1]} == {None}


def test_a_stream_that_waits_is_kept_alive() -> None:
    body = GOOD | IGNORE_EOS | {"max_tokens": 3, "stream": True}
    with (
        live_stepped(keep_alive_seconds=0.05) as (stepped, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60, verify=False) as answer,
    ):
        pieces = answer.iter_raw()
        assert [next(pieces) for _ in range(3)] == [b": keep-alive\n\n"] * 3
        stepped.open()
        rest = b"".join(pieces).decode()
    assert len([choice for event in data_of(rest) for choice in event["choices"]]) == 3


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_stream_is_without_comments_else(seconds: float) -> None:
    with ThreadPoolExecutor(1) as clients, live_stepped(keep_alive_seconds=seconds) as (stepped, url):
        answer = clients.submit(post, url, GOOD | {"stream": True})
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == 1)
        stepped.open()
        assert ":" not in {line[:1] for line in answer.result().text.splitlines()}


def test_every_answer_has_an_id(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        post(url, GOOD),
        post(url, GOOD | {"stream": True}),
        post(url, b"{"),
        post(url, GOOD, key="wrong"),
        http_get(f"{url}/nothing"),
        http_get(f"{url}/health"),
    ]
    assert [answer.status_code for answer in asked] == [200, 200, 400, 401, 404, 200]

    def fail(*_: object) -> None:
        raise RuntimeError("no text")

    monkeypatch.setattr("xgdn.server.handlers.Generation", fail)
    asked.append(post(url, GOOD))
    assert asked[-1].status_code == 500
    ids = {answer.headers["X-Request-Id"] for answer in asked}
    assert len(ids) == len(asked)
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", it) for it in ids)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        (b"abc-123/{}~", True),
        (b"x" * 128, True),
        (b"x" * 129, False),
        (b"a b", False),
        ("é".encode(), False),
        (b"", False),
    ],
)
def test_a_client_s_id_is_taken_if_it_is_fit_for_a_log(url: str, given: bytes, is_taken: bool) -> None:
    answer = http_post(f"{url}/v1/completions", json=GOOD, headers=HEADERS | {"X-Request-Id": given})
    assert (answer.headers["X-Request-Id"].encode() == given) == is_taken


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == "xgdn.server.access"]


def test_the_log_has_a_line_for_each_request_but_polls(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xgdn.server.access")
    polls = [http_get(url + path) for path in ("/", "/health", "/ready", "/metrics", "/stats", "/stats/history")]
    body = GOOD | IGNORE_EOS | {"prompt": [1, 2, 3], "max_tokens": 5, "n": 2}
    answers = [
        post(url, body),
        post(url, body | {"stream": True}),
        post(url, b"{"),
        http_get(f"{url}/a%0Ab?key=secret"),
    ]
    ids = {answer.headers["X-Request-Id"] for answer in [*polls, *answers]}

    def own_lines() -> list[dict[str, Any]]:
        """Without late ones of requests of before: a line comes after its answer."""
        return [line for line in lines(caplog) if any(f"request_id={it} " in line["message"] for it in ids)]

    wait_until(lambda: len(own_lines()) >= 4)
    whole, stream, bad, unknown = own_lines()
    for line in (whole, stream):
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 10)
        assert line["finish_reasons"] == ["length", "length"]
        assert 0 < line["seconds"] < 60
        assert line["key"] == "tests"
    assert (bad["status"], bad["error"]) == (400, "invalid_json")
    assert (unknown["status"], unknown["error"], unknown["path"]) == (404, "not_found", "/a%0Ab")
    for line, answer in zip(own_lines(), answers, strict=True):
        assert f"request_id={answer.headers['X-Request-Id']} " in line["message"]
        assert KEY not in line["message"]
        assert "\n" not in line["message"]
        assert "secret" not in line["message"]


def test_a_client_that_leaves_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xgdn.server.access")
    body = GOOD | IGNORE_EOS | {"max_tokens": 100, "stream": True}
    with live_stepped() as (stepped, url):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=HEADERS, timeout=60, verify=False
        ) as answer:
            stepped.allow(1)
            next(answer.iter_raw())
        wait_until(lambda: len(lines(caplog)) == 1)
        (line,) = lines(caplog)
        assert line["finish_reasons"] == ["cancelled"]
        assert line["completion_tokens"] == 1


def test_readiness_is_room_in_the_queue() -> None:
    with ThreadPoolExecutor(1) as clients, live_stepped() as (stepped, url):
        assert http_get(f"{url}/ready").json() == {"status": "ready"}
        full = clients.submit(post, url, GOOD | {"prompt": ["a"] * (SLOTS + QUEUE), "max_tokens": 1})
        wait_until(lambda: metrics(url)["xgdn_requests_waiting"] == SLOTS + QUEUE)
        answer = http_get(f"{url}/ready")
        assert (answer.status_code, answer.json()) == (503, {"status": "queue_full"})
        assert http_get(f"{url}/health").status_code == 200
        stepped.open()
        assert full.result().status_code == 200
        wait_until(lambda: http_get(f"{url}/ready").status_code == 200)


def test_the_log_in_json_is_an_object_a_line(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "team", "key": KEY}]))
    defaults = tmp_path / "defaults.json"
    defaults.write_text('{"temperature": 0.5}')
    log = tmp_path / "log"
    with log.open("w") as stderr:
        options = ("--log-format", "json", "--api-keys-file", str(keys), "--generation-config", str(defaults))
        with command(*options, stderr=stderr) as (process, url):
            body = GOOD | IGNORE_EOS | {"max_tokens": 2}
            answer = post(url, body)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    documents = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= document.keys() for document in documents)
    assert "temperature 0.5" in documents[0]["message"]
    assert {document["logger"] for document in documents} == {
        "xgdn.server.serve", "xgdn.server.access", "uvicorn.error"
    }  # fmt: skip
    (line,) = [document for document in documents if document["logger"] == "xgdn.server.access"]
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert (line["method"], line["path"], line["status"], line["key"]) == ("POST", "/v1/completions", 200, "team")
    assert (line["completion_tokens"], line["finish_reasons"]) == (2, ["length"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", line["time"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a certificate for 127.0.0.1, with its key, plain and encrypted."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = shutil.which("openssl")
    assert openssl is not None, "the openssl program is missing: apt-get install openssl"
    subject = ("-subj", "/CN=xgdn", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    for arguments in (
        ("req", "-x509", *curve, "-nodes", *subject, "-keyout", "key.pem", "-out", "cert.pem"),
        ("pkey", "-in", "key.pem", "-aes256", "-passout", "pass:word", "-out", "encrypted.pem"),
    ):
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)
    return folder


def test_https(certificate: Path) -> None:
    cert = certificate / "cert.pem"
    options = ("--ssl-certfile", str(cert), "--ssl-keyfile", str(certificate / "encrypted.pem"))
    # The client shows the same certificate: it is signed by itself, so it is its own authority.
    with command(*options, "--ssl-keyfile-password", "word", "--ssl-ca-certs", str(cert)) as (_, url):
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", verify=context)
        context.load_cert_chain(cert, certificate / "key.pem")
        assert httpx.get(f"{url}/health", verify=context).json() == {"status": "ok"}
        assert httpx.post(f"{url}/v1/completions", json=GOOD, verify=context, timeout=60).status_code == 200
        with pytest.raises(httpx.HTTPError):
            http_get(url.replace("https", "http"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ssl-certfile", "cert.pem"], "cannot be used"),
        (["--ssl-certfile", "cert.pem", "--ssl-keyfile", "encrypted.pem"], "cannot be used"),
        (["--ssl-certfile", "key.pem", "--ssl-keyfile", "key.pem"], "cannot be used"),
        (["--ssl-keyfile", "key.pem"], "need --ssl-certfile"),
    ],
    ids=str,
)
def test_a_certificate_that_does_not_fit_is_said_before_the_model_is_loaded(
    certificate: Path, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("xgdn.cli.serve.load_engine", load)
    monkeypatch.chdir(certificate)
    result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), *options])
    assert result.exit_code == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
