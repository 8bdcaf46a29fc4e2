# SPDX-License-Identifier: Apache-2.0
"""The C++ server of examples/embed_server, built against an installed xgdn and asked over HTTP."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

TIMEOUT = 120.0  # seconds; of what hangs, not of what is slow
SLOTS = 32  # RunnerOptions' default
PROMPTS = [[5, 6, 7, 8, 9], [1], [100, 3, 100], list(range(70)), [42] * 130, [9, 8], [77, 0, 77, 0], [64]]


class Server:
    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self.client = httpx.Client(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))

    def post(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=body)

    def complete(self, prompt: list[int], **options: Any) -> list[list[int]]:
        """The tokens of each choice."""
        response = self.post(prompt=prompt, **options)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(options.get("n", 1)))
        return [choice["token_ids"] for choice in choices]

    @contextmanager
    def stream(self, prompt: list[int], **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events before "[DONE]"; leaving the context leaves the server."""
        with self.client.stream("POST", "/v1/completions", json={"prompt": prompt, "stream": True, **options}) as got:
            assert got.status_code == 200, got.read()
            assert got.headers["content-type"] == "text/event-stream"
            yield _events(got.iter_lines())

    def free_slots(self) -> int:
        return int(self.client.get("/health").json()["free_slots"])


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line:
            continue
        assert line.startswith("data: "), line
        if line == "data: [DONE]":
            assert [rest for rest in lines if rest] == [], "something follows [DONE]"
            return
        yield json.loads(line.removeprefix("data: "))
    pytest.fail("the stream ended without [DONE]")


@contextmanager
def _running(program: str, model: Path, *arguments: str) -> Iterator[Server]:
    process = subprocess.Popen([program, str(model), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://"), f"{line!r}, exit status {process.poll()}"
        server = Server(process, line.split()[-1])
        with server.client:
            yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def program(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("server"))


@pytest.fixture(scope="module")
def model(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.getoption("model"))


@pytest.fixture(scope="module")
def server(program: str, model: Path) -> Iterator[Server]:
    with _running(program, model) as running:
        yield running
        assert running.process.poll() is None, "the server ended by itself"


@pytest.fixture
def slots(server: Server) -> Iterator[int]:
    """How many there are; all are free before and after the test."""
    total = server.free_slots()
    assert total == SLOTS
    yield total
    assert server.free_slots() == total


def test_the_process_holds_no_python(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libxgdn.so" in maps
    assert "libpython" not in maps
    assert "libtorch_python" not in maps


def test_health_and_models(server: Server, model: Path) -> None:
    assert server.client.get("/health").json()["status"] == "ok"
    assert server.client.get("/v1/models").json() == {
        "object": "list",
        "data": [{"id": str(model), "object": "model"}],
    }


def test_generates_what_transformers_does(server: Server, pytestconfig: pytest.Config) -> None:
    prompt = [int(token) for token in pytestconfig.getoption("prompt").split()]
    expected = [int(token) for token in pytestconfig.getoption("expected").split()]
    response = server.post(prompt=prompt, max_tokens=len(expected), temperature=0, ignore_eos=True, model="any")
    assert response.json() == {
        "choices": [{"index": 0, "token_ids": expected, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(expected),
            "total_tokens": len(prompt) + len(expected),
        },
    }


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5, "seed": 3, "top_k": 50, "top_p": 0.9}])
def test_concurrent_clients_get_what_each_gets_alone(server: Server, slots: int, options: dict[str, Any]) -> None:
    options = {**options, "max_tokens": 40, "ignore_eos": True}
    alone = [server.complete(prompt, **options) for prompt in PROMPTS]
    assert len({str(tokens) for tokens in alone}) == len(PROMPTS), "the prompts do not tell requests apart"
    together = threading.Barrier(len(PROMPTS))

    def ask(prompt: list[int]) -> list[list[list[int]]]:
        together.wait()
        return [server.complete(prompt, **options) for _ in range(3)]

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        assert list(clients.map(ask, PROMPTS)) == [[tokens] * 3 for tokens in alone]


def test_requests_share_steps(server: Server, slots: int) -> None:
    with server.stream([1], max_tokens=10_000, ignore_eos=True) as first:
        next(first)
        with server.stream([2], max_tokens=10_000, ignore_eos=True) as second:
            next(second)
            assert server.free_slots() == slots - 2
            server.complete([3], max_tokens=20, ignore_eos=True)  # ends while the others are under way
            for stream in (first, second):
                assert next(stream)["choices"][0]["finish_reason"] is None
    _wait_for_free_slots(server, slots)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_answer(server: Server, slots: int, n: int) -> None:
    options = {"prompt": [5, 6, 7], "max_tokens": 12, "seed": 11, "n": n, "ignore_eos": True}
    answer = server.post(**options).json()
    choices = [{"index": index, "token_ids": [], "finish_reason": None} for index in range(n)]
    with server.stream(**options) as events:
        for event in events:
            (choice,) = event["choices"]
            assert len(choice["token_ids"]) == 1, "an event per token"
            sum_up = choices[choice["index"]]
            assert sum_up["finish_reason"] is None, "an event after the last"
            sum_up["token_ids"] += choice["token_ids"]
            sum_up["finish_reason"] = choice["finish_reason"]
    assert choices == answer["choices"]
    assert event["usage"] == answer["usage"]
    assert answer["usage"]["completion_tokens"] == 12 * n


def test_replies_are_those_of_consecutive_seeds(server: Server) -> None:
    options = {"max_tokens": 12, "temperature": 2.0, "ignore_eos": True}
    replies = server.complete([5, 6, 7], n=2, seed=20, **options)
    assert replies[0] != replies[1]
    assert replies == [server.complete([5, 6, 7], seed=seed, **options)[0] for seed in (20, 21)]


def test_stop_tokens_end_a_reply(server: Server) -> None:
    (tokens,) = server.complete([5, 6, 7], max_tokens=12, temperature=0, ignore_eos=True)
    stop = tokens[5]
    (choice,) = server.post(
        prompt=[5, 6, 7], max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[stop]
    ).json()["choices"]
    assert choice == {"index": 0, "token_ids": tokens[: tokens.index(stop) + 1], "finish_reason": "stop"}


def test_a_reply_of_no_tokens(server: Server, slots: int) -> None:
    answer = server.post(prompt=[5, 6, 7], max_tokens=0).json()
    assert answer["choices"] == [{"index": 0, "token_ids": [], "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    with server.stream([5, 6, 7], max_tokens=0) as events:
        assert [event["choices"] for event in events] == [answer["choices"]]


def test_without_a_seed_replies_differ(server: Server) -> None:
    replies = [server.complete([5], max_tokens=40, temperature=5.0, ignore_eos=True)[0] for _ in range(2)]
    assert replies[0] != replies[1]


REFUSED = {
    "no JSON": (b"{nonsense", "parse error"),
    "not UTF-8": (b'{"prompt": "\xff"}', "parse error"),
    "empty body": (b"", "parse error"),
    "number beyond double": (b'{"temperature": 1e999}', "number overflow"),
    "no object": (b"[1, 2]", "array"),
    "no prompt": (b"{}", "prompt: expected at least one token"),
    "prompt null": (b'{"prompt": null}', "prompt: expected at least one token"),
    "prompt empty": (b'{"prompt": []}', "prompt: expected at least one token"),
    "prompt text": (b'{"prompt": "def f():"}', "prompt"),
    "prompt of texts": (b'{"prompt": [1, "2"]}', "prompt"),
    "prompt of fractions": (b'{"prompt": [1.5]}', "prompt"),
    "prompt of flags": (b'{"prompt": [true]}', "prompt"),
    "prompt of 33 bits": (b'{"prompt": [4294967296]}', "prompt"),
    "prompt of 64 bits": (b'{"prompt": [18446744073709551615]}', "prompt"),
    "nested prompt": (b'{"prompt": [[1]]}', "prompt"),
    "unknown token": (b'{"prompt": [1, 128]}', "expected token ids 0..127, got 128 at index 1"),
    "negative token": (b'{"prompt": [-1]}', "expected token ids 0..127, got -1 at index 0"),
    "too many tokens": (b'{"prompt": [1], "max_tokens": 1000000}', "KV cache tokens, got 1 + 1000000"),
    "max_tokens negative": (b'{"prompt": [1], "max_tokens": -1}', "max_new_tokens: expected at least 0, got -1"),
    "max_tokens text": (b'{"prompt": [1], "max_tokens": "many"}', "max_tokens"),
    "max_tokens fraction": (b'{"prompt": [1], "max_tokens": 2.5}', "max_tokens"),
    "max_tokens flag": (b'{"prompt": [1], "max_tokens": true}', "max_tokens"),
    "max_tokens huge": (b'{"prompt": [1], "max_tokens": 1e300}', "max_tokens"),
    "temperature text": (b'{"prompt": [1], "temperature": "hot"}', "temperature"),
    "temperature negative": (b'{"prompt": [1], "temperature": -1}', "temperature"),
    "top_p": (b'{"prompt": [1], "top_p": 1.5}', "top_p"),
    "top_k": (b'{"prompt": [1], "top_k": -1}', "top_k"),
    "seed": (b'{"prompt": [1], "seed": "x"}', "seed"),
    "ignore_eos": (b'{"prompt": [1], "ignore_eos": 1}', "ignore_eos"),
    "stream": (b'{"prompt": [1], "stream": "yes"}', "stream"),
    "stop_token_ids": (b'{"prompt": [1], "stop_token_ids": 5}', "stop_token_ids"),
    "n zero": (b'{"prompt": [1], "n": 0}', "n: expected at least 1, got 0"),
    "n too large": (b'{"prompt": [1], "n": 1000000000000}', "branches, a state slot for each"),
    "unknown field": (b'{"prompt": [1], "max_token": 5}', "max_token"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "prompt"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_with_a_reason(server: Server, slots: int, case: str, stream: bool) -> None:
    body, reason = REFUSED[case]
    if stream and body.startswith(b"{") and body.endswith(b"}") and case not in ("stream", "no prompt"):
        body = body[:-1] + b', "stream": true}'
    response = server.client.post("/v1/completions", content=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert reason in error["message"]
    assert len(error["message"]) < 400


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    body = b'{"prompt": [' + b"1," * 2**20 + b"1]}"
    chunks = (body[begin : begin + 2**16] for begin in range(0, len(body), 2**16))
    response = server.client.post("/v1/completions", content=body)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "POST /v1/completions: HTTP status 413"
    # Without a Content-Length httplib 0.11 reads it all, and the engine refuses the prompt.
    assert server.client.post("/v1/completions", content=chunks).status_code in (400, 413)


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("POST", "/v1/chat/completions")])
def test_an_unknown_path_is_refused(server: Server, method: str, path: str) -> None:
    response = server.client.request(method, path)
    assert response.status_code == 404
    assert path in response.json()["error"]["message"]


def test_a_failure_of_the_engine_ends_its_request_alone(program: str, model: Path, tmp_path: Path) -> None:
    broken_token = 127  # its embedding is NaN, so a prompt that holds it has no logits
    broken_model = tmp_path / "broken"
    shutil.copytree(model, broken_model)
    weights = load_file(broken_model / "model.safetensors")
    weights["model.embed_tokens.weight"][broken_token] = float("nan")
    save_file(weights, broken_model / "model.safetensors", metadata={"format": "pt"})

    options = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with _running(program, broken_model) as server:
        (expected,) = server.complete([5, 6], **options)
        with server.stream([5, 6], **options) as events:
            tokens = next(events)["choices"][0]["token_ids"]
            for n in (1, 2):
                response = server.post(prompt=[5, broken_token], n=n)
                assert response.status_code == 500
                assert response.json()["error"]["type"] == "server_error"
                assert "logits" in response.json()["error"]["message"]
            with server.stream([5, broken_token]) as broken:
                (event,) = list(broken)
            assert event["error"]["type"] == "server_error"
            assert "logits" in event["error"]["message"]
            for event in events:
                tokens += event["choices"][0]["token_ids"]
        assert tokens == expected
        assert server.free_slots() == SLOTS


def _wait_for_free_slots(server: Server, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while server.free_slots() != count:
        assert time.monotonic() < deadline, f"{server.free_slots()} slots are free, not {count}"


@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_leaves_frees_its_slots(server: Server, slots: int, n: int) -> None:
    with server.stream([2], max_tokens=1000, ignore_eos=True) as other:
        next(other)
        with server.stream([1], max_tokens=12_000 // n, n=n, ignore_eos=True) as left:
            next(left)
            assert server.free_slots() == slots - 1 - n
        for _ in other:
            pass
    # Both shared their steps, so the request that was left would have most of its own yet to come.
    assert server.free_slots() == slots


@pytest.mark.parametrize("n", [1, 4])
def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_frees_its_slots(
    server: Server, slots: int, n: int
) -> None:
    body = json.dumps({"prompt": [1], "max_tokens": 12_000 // n, "n": n, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    address = (server.client.base_url.host, server.client.base_url.port)
    with server.stream([2], max_tokens=1000, ignore_eos=True) as other:
        next(other)
        with socket.create_connection(address, timeout=TIMEOUT) as left:
            left.sendall(head + body)
            _wait_for_free_slots(server, slots - 1 - n)
        for _ in other:
            pass
    # Both shared their steps, so the request that was left would have most of its own yet to come.
    assert server.free_slots() == slots


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no http at all\r\n\r\n", id="garbage"),
        pytest.param(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{", id="half a body"),
        pytest.param(
            b'POST /v1/completions HTTP/1.1\r\nContent-Length: 34\r\n\r\n{"prompt": [1], "max_tokens": 500}',
            id="no ear",
        ),
    ],
)
def test_a_client_that_sends_and_goes_disturbs_nobody(server: Server, slots: int, sent: bytes) -> None:
    address = (server.client.base_url.host, server.client.base_url.port)
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        connection.sendall(sent)
    assert len(server.complete([5], max_tokens=3, ignore_eos=True)[0]) == 3
    _wait_for_free_slots(server, slots)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_requests_finish_and_ends_the_server(program: str, model: Path, name: str) -> None:
    with _running(program, model) as server:
        (expected,) = server.complete([5], max_tokens=400, temperature=0, ignore_eos=True)
        with server.stream([5], max_tokens=400, temperature=0, ignore_eos=True) as events:
            tokens = next(events)["choices"][0]["token_ids"]
            server.process.send_signal(signal.Signals[name])
            for event in events:
                tokens += event["choices"][0]["token_ids"]
        assert tokens == expected
        assert server.process.wait(TIMEOUT) == 0
        with pytest.raises(httpx.ConnectError):
            server.client.get("/health")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_an_idle_server(program: str, model: Path, name: str) -> None:
    with _running(program, model) as server:
        server.process.send_signal(signal.Signals[name])
        assert server.process.wait(TIMEOUT) == 0


def test_a_port_that_is_taken_is_an_error(program: str, model: Path, server: Server) -> None:
    port = str(server.client.base_url.port)
    second = subprocess.run([program, model, port], capture_output=True, text=True, timeout=TIMEOUT)
    assert second.returncode == 1
    assert port in second.stderr


def test_a_port_can_be_chosen(program: str, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with _running(program, model, str(port)) as server:
        assert server.client.base_url.port == port
        assert server.client.get("/health").status_code == 200


def test_a_model_that_is_not_there_is_an_error(program: str, tmp_path: Path) -> None:
    for arguments in ([], [tmp_path / "nothing"]):
        ended = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=TIMEOUT)
        assert ended.returncode == 1
        assert ended.stderr.startswith("embed_server: ")
