# SPDX-License-Identifier: Apache-2.0
"""curl: the interface without a client library."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from served import KEY, PAUSE, Reference, Server

BODY: dict[str, Any] = {"model": "tiny", "prompt": "a", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
TIMEOUT_STATUS = 28  # of curl's process


def curl(url: str, body: Any = None, *options: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    data = [] if body is None else ["--json", json.dumps(body)]
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--header", f"Authorization: Bearer {key}"]
    return subprocess.run([*command, *data, *options, url], capture_output=True, text=True, timeout=60)


def test_an_answer(server: Server, reference: Reference) -> None:
    answer = json.loads(curl(f"{server.url}/completions", BODY).stdout)
    assert answer["choices"][0]["text"] == reference.want("a")
    assert answer["usage"]["completion_tokens"] == 16


def test_a_stream(server: Server, reference: Reference) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = {name: value for name, value in BODY.items() if name != "prompt"} | {"messages": messages, "stream": True}
    done = curl(f"{server.url}/chat/completions", body, "--no-buffer", "--include")
    head, _, events = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert "content-type: text/event-stream" in head
    *chunks, last = [event for event in events.split("\n\n") if event]
    assert last == "data: [DONE]"
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == reference.chat("a")


def test_tokens(server: Server, reference: Reference) -> None:
    ids = json.loads(curl(f"{server.address}/tokenize", {"prompt": "import os"}).stdout)["tokens"]
    assert ids == reference.tokens_of("import os")
    assert json.loads(curl(f"{server.address}/detokenize", {"tokens": ids}).stdout) == {"prompt": "import os"}


def test_a_response_streams(server: Server, reference: Reference) -> None:
    body = {"model": "tiny", "input": "a", "temperature": 0, "max_output_tokens": 16, "stream": True}
    events = [event.split("\n") for event in curl(f"{server.url}/responses", body).stdout.split("\n\n") if event]
    documents = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [kind.removeprefix("event: ") for kind, _ in events] == [document["type"] for document in documents]
    deltas = [document["delta"] for document in documents if document["type"] == "response.output_text.delta"]
    assert "".join(deltas) == reference.chat("a")


def test_an_error_has_a_status_and_a_body(server: Server) -> None:
    done = curl(f"{server.url}/completions", BODY | {"n": 0}, "--write-out", "%{stderr}%{http_code}")
    assert done.stderr == "400"
    assert json.loads(done.stdout)["error"]["param"] == "n"
    assert curl(f"{server.url}/models", None, "--fail", key="other").returncode == 22
    assert curl(f"{server.address}/health", None, "--fail", "--head").returncode == 0


def test_a_time_limit_frees_what_the_request_held(server: Server) -> None:
    for stream in (False, True):
        with server.left():
            body = BODY | {"max_tokens": 8000, "stream": stream}
            done = curl(f"{server.url}/completions", body, "--max-time", "0.5")
            assert done.returncode == TIMEOUT_STATUS


def test_retries_come_when_the_server_says(narrow_server: Server, reference: Reference) -> None:
    """Without Retry-After curl would wait for as long as --retry-delay says."""
    with narrow_server.busy_once() as seconds_since:
        done = curl(f"{narrow_server.url}/completions", BODY, "--fail", "--retry", "1", "--retry-delay", "30")
        assert PAUSE <= seconds_since() < 30
    assert json.loads(done.stdout)["choices"][0]["text"] == reference.want("a")
