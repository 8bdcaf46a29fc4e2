# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client for JavaScript, by javascript/client.mjs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from served import KEY, PAUSE, ROOT, Reference, Server

PROMPT = "def __init__(self"
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call(environments: Path) -> Call:
    """Runs a call of client.mjs against a server; returns what it prints."""
    program = environments / "javascript/client.mjs"
    shutil.copyfile(ROOT / "tests/clients/javascript/client.mjs", program)

    def run(name: str, server: Server) -> Any:
        command = ["node", str(program), name, server.url, KEY]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60).stdout)

    return run


def test_completions(call: Call, server: Server, reference: Reference) -> None:
    answer = call("completions", server)
    wanted = [reference.want(prompt, temperature=0.9, seed=seed) for prompt in (PROMPT, "a") for seed in (7, 8)]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert answer["usage"]["completion_tokens"] == 4 * 16


def test_chats(call: Call, server: Server, reference: Reference) -> None:
    both = call("chats", server)
    answer, helper = both["answer"]["choices"][0], both["helper"]["choices"][0]
    assert answer["message"]["content"] == helper["message"]["content"] == reference.chat("a")
    assert answer["finish_reason"] == helper["finish_reason"] == "length"
    assert both["helper"]["usage"]["total_tokens"] == both["answer"]["usage"]["total_tokens"]


def test_streams(call: Call, server: Server, reference: Reference) -> None:
    *chunks, last = call("streams", server)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == reference.want(PROMPT)
    assert len(chunks) > 5
    assert last["usage"]["completion_tokens"] == 16


def test_logprobs(call: Call, server: Server) -> None:
    choice = call("logprobs", server)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == choice["message"]["content"]
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] for token in tokens)
    assert all(sum(math.exp(it["logprob"]) for it in token["top_logprobs"]) <= 1 + 1e-6 for token in tokens)


def is_paint(document: Any) -> bool:
    return document["colour"] in ("red", "green") and document["is_new"] in (True, False) and len(document) == 2


def test_structured_output(call: Call, server: Server) -> None:
    whole, stream = call("structured", server)
    assert is_paint(whole)
    assert stream == whole


def test_tools_run(call: Call, server: Server) -> None:
    result = call("tools", server)
    assert is_paint(result["given"][0])
    assert result["roles"][:3] == ["user", "assistant", "tool"]


def test_responses(call: Call, server: Server, reference: Reference) -> None:
    answers = call("responses", server)
    whole, final, following = answers["texts"]
    assert whole == final == reference.chat("a")
    assert following == reference.want(f"# user: a\n# assistant: {whole}\n# user: b\n# assistant:")
    assert answers["events"][0] == "response.created"
    assert answers["events"][-1] == "response.incomplete"
    assert answers["events"].count("response.output_text.delta") > 5


def test_models(call: Call, server: Server) -> None:
    assert [model["id"] for model in call("models", server)] == ["tiny"]


def test_errors_have_their_classes(call: Call, server: Server) -> None:
    assert call("errors", server) == [
        {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
        {"name": "BadRequestError", "status": 400, "code": "invalid_value", "param": "temperature"},
        {"name": "AuthenticationError", "status": 401, "code": "invalid_api_key", "param": None},
    ]


@pytest.mark.parametrize("name", ["timeout", "abort"])
def test_who_leaves_frees_what_the_request_held(call: Call, server: Server, name: str) -> None:
    with server.left():
        result = call(name, server)
    assert result == 1 if name == "abort" else result["name"] == "APIConnectionTimeoutError"


def test_a_full_server_is_a_rate_limit(call: Call, narrow_server: Server) -> None:
    with narrow_server.busy():
        error = call("full", narrow_server)
    assert error == {"name": "RateLimitError", "status": 429, "code": "queue_full", "param": None}


def test_retries_come_when_the_server_says(call: Call, narrow_server: Server, reference: Reference) -> None:
    with narrow_server.busy_once() as seconds_since:
        answer = call("retries", narrow_server)
        assert seconds_since() >= PAUSE
    assert answer["choices"][0]["text"] == reference.want(PROMPT)
