# SPDX-License-Identifier: Apache-2.0
"""examples/ray_serve on a local Ray: replicas of the small model, conversations, deaths, versions."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.context import _get_global_client

from live_server import KEY, wait_until, with_template
from ray_serve.app import build
from ray_serve.arguments import Arguments
from ray_serve.replica import Replica
from ray_serve.versions import xgdn_version

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "tiny"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SLOTS, QUEUE = 4, 8  # sequences of a replica, requests that wait for one
LONG = {"max_tokens": 6000, "ignore_eos": True}  # takes far longer than any test needs
RESTART_SECONDS = 90.0
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENS = ('"text": "', '"content": "', '"delta": "')  # in events of the three
LOST = "The replica that wrote this answer died."

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class App:
    """An application that runs."""

    name: str
    url: str

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": MODEL, **body}, headers=HEADERS, timeout=120, **options)

    def get(self, path: str, headers: dict[str, str] = HEADERS) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=120)

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[httpx.Response]:
        document = {"model": MODEL, "stream": True, **body}
        with httpx.stream("POST", self.url + path, json=document, headers=HEADERS, timeout=60) as response:
            assert response.status_code == 200
            yield response

    def processes(self) -> dict[str, int]:
        """Replicas that take requests, with their processes."""
        deployments = _get_global_client().get_serve_details()["applications"][self.name]["deployments"]
        replicas = deployments["Replica"]["replicas"]
        return {it["replica_id"]: it["pid"] for it in replicas if it["state"] == "RUNNING" and it["pid"]}

    def wait_for(self, count: int, without: Sequence[str] = ()) -> None:
        """Return once there are so many replicas, none of them one of those, and the gateway knows them."""
        scraped: set[str] = set()

        def are_there() -> bool:
            names = set(self.processes())
            scraped.clear()
            scraped.update(self.metrics("xgdn_healthy"))
            return len(names) == count and names == scraped and names.isdisjoint(without)

        wait_until(are_there, RESTART_SECONDS)

    def kill(self, replica: str) -> None:
        os.kill(self.processes()[replica], signal.SIGKILL)

    def metrics(self, name: str) -> dict[str, float]:
        """Values of one metric, by replica."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {it.labels["replica"]: it.value for family in families for it in family.samples if it.name == name}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., App]]:
    """Runs an application on a Ray of its own."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps([{"name": "tests", "key": KEY}]))
    model = with_template(tmp_path_factory.mktemp("model"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ["PYTHONPATH"] = str(EXAMPLES)  # of Ray's processes
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"port": port})

    def start(name: str, **arguments: Any) -> App:
        chosen = {"max_batch_size": SLOTS, "max_cached_tokens": 2**16, "dtype": "float32", "api_keys_file": keys}
        application = build(Arguments(model=model, model_name=MODEL, **(chosen | arguments)))
        serve.run(application, name=name, route_prefix=f"/{name}")
        return App(name, f"http://127.0.0.1:{port}/{name}")

    yield start
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def app(run: Callable[..., App]) -> App:
    """Two replicas, routed by prefix."""
    started = run("prefix", min_replicas=2, max_queue=QUEUE)
    started.wait_for(2)
    return started


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Turn:
    replica: str
    prompt_tokens: int
    cached_tokens: int


def conversation(app: App, name: str, turns: int = 6) -> list[Turn]:
    """Hold a conversation in which each turn repeats all before."""
    messages = [says("system", "You write Python.")]
    told = []
    for turn in range(turns):
        messages.append(says("user", f"{name}, {turn}: " + f"def {name}_{turn}(self, value): return value\n" * 16))
        answer = app.post(CHAT, {"messages": messages, "max_tokens": 8, "ignore_eos": True})
        document = answer.json()
        usage = document["usage"]
        told.append(
            Turn(
                answer.headers["x-replica"],
                usage["prompt_tokens"],
                usage["prompt_tokens_details"]["cached_tokens"],
            )
        )
        messages.append(says("assistant", document["choices"][0]["message"]["content"]))
    return told


def conversations(app: App, label: str) -> list[list[Turn]]:
    with ThreadPoolExecutor(SLOTS) as clients:
        return list(clients.map(lambda i: conversation(app, f"{label}_{i}"), range(2 * SLOTS)))


def num_computed_again(held: list[list[Turn]]) -> int:
    """Count the turns for which the state of the turn before was not there."""
    pairs = [pair for turns in held for pair in pairwise(turns)]
    return sum(turn.cached_tokens < before.prompt_tokens - 64 for before, turn in pairs)


def test_conversations_stay_where_their_states_are_and_are_spread(app: App) -> None:
    held = conversations(app, "stays")
    for turns in held:
        assert len({turn.replica for turn in turns}) == 1
        assert all(turn.cached_tokens > before.cached_tokens for before, turn in pairwise(turns))
    assert num_computed_again(held) == 0
    assert {turns[0].replica for turns in held} == set(app.processes())


def test_replicas_are_added_and_without_routing_by_prefix_conversations_move(run: Callable[..., App]) -> None:
    other = run("load", routing="load", min_replicas=1, target_requests=1, upscale_seconds=0)
    assert len(other.processes()) == 1
    with ExitStack() as held:
        lines = [
            held.enter_context(other.stream(COMPLETIONS, {"prompt": f"def f{i}(", **LONG})).iter_lines()
            for i in range(3)
        ]
        other.wait_for(2)
        moving = conversations(other, "moves")
        del lines
    moved = sum(len({turn.replica for turn in turns}) == 2 for turns in moving)
    assert moved > 0
    assert num_computed_again(moving) >= moved
    serve.delete("load")


def test_stored_responses_are_found(app: App) -> None:
    for replica in app.processes():
        first = app.post(RESPONSES, {"input": text_of(app, RESPONSES, replica), "max_output_tokens": 4})
        previous = first.json()["id"]
        for _ in range(2):
            more = {"input": "more", "previous_response_id": previous, "max_output_tokens": 4, "stream": True}
            with app.stream(RESPONSES, more) as answer:
                *_, last = (line for line in answer.iter_lines() if line.startswith("data: "))
            assert answer.headers["x-replica"] == first.headers["x-replica"]
            previous = json.loads(last.removeprefix("data: "))["response"]["id"]
        kept = app.get(f"{RESPONSES}/{previous}")
        assert (kept.status_code, kept.json()["id"]) == (200, previous)
    missing = app.post(RESPONSES, {"input": "more", "previous_response_id": "resp_0"}).json()["error"]
    assert (missing["code"], missing["message"]) == (
        "previous_response_not_found",
        "'previous_response_id': there is no response 'resp_0', or no longer.",
    )


def test_what_the_server_says_comes_through(app: App) -> None:
    assert app.get("/health").json() == {"status": "ok"}
    assert app.get("/ready").json() == {"status": "ready"}
    assert app.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert app.get("/v1/models", headers={}).json()["error"]["code"] == "invalid_api_key"
    assert app.get("/nothing").json()["error"]["code"] == "not_found"
    wrong = app.post(CHAT, {"messages": 5})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages")
    large = app.post(COMPLETIONS, {"prompt": "a" * Arguments.model_fields["max_body_bytes"].default})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert len(wrong.headers.get_list("x-request-id")) == 1
    assert set(app.metrics("xgdn_healthy")) == set(app.processes())


def test_a_client_that_leaves_frees_what_it_held(app: App) -> None:
    with app.stream(COMPLETIONS, {"prompt": "def f(", **LONG}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert sum(app.metrics("xgdn_requests_running").values()) == 1
        lines.close()
    wait_until(lambda: sum(app.metrics("xgdn_requests_running").values()) == 0)
    assert sum(app.metrics("xgdn_slots_used").values()) == 0


def body_of(path: str, text: str) -> dict[str, Any]:
    """Ask an endpoint to go on with a text for long."""
    if path == RESPONSES:
        return {"input": text, "max_output_tokens": LONG["max_tokens"], "logit_bias": {"0": -100}}  # no end of text
    return {**({"prompt": text} if path == COMPLETIONS else {"messages": [says("user", text)]}), **LONG}


def text_of(app: App, path: str, replica: str) -> str:
    """Return a text whose beginning a replica has had, and no other."""
    for i in range(100):
        text = f"def only_{replica}_{i}(self"
        length = "max_output_tokens" if path == RESPONSES else "max_tokens"
        if app.post(path, body_of(path, text) | {length: 1}).headers["x-replica"] == replica:
            return text
    raise AssertionError(f"no request came to {replica}")


def begin(app: App, path: str, text: str, held: ExitStack, **fields: Any) -> Iterator[str]:
    """Hold a stream whose first token has come; return the lines of the rest."""
    lines = held.enter_context(app.stream(path, body_of(path, text) | fields)).iter_lines()
    next(line for line in lines if line.startswith("data: ") and any(it in line for it in TOKENS))
    return lines


def test_streams_that_had_begun_end_with_an_error_and_documents_are_answered_elsewhere(app: App) -> None:
    dying, other = sorted(app.processes())
    texts = {path: text_of(app, path, dying) for path in (COMPLETIONS, CHAT, RESPONSES)}
    document = {"prompt": text_of(app, COMPLETIONS, dying), **LONG, "max_tokens": 1000, "temperature": 0}
    alone = app.post(COMPLETIONS, document).json()["choices"]
    with ExitStack() as held, ThreadPoolExecutor(1) as clients:
        begun = {path: begin(app, path, text, held) for path, text in texts.items()}
        waiting = clients.submit(app.post, COMPLETIONS, document)
        wait_until(lambda: app.metrics("xgdn_requests_running") == {dying: 4, other: 0})
        app.kill(dying)
        killed = time.monotonic()
        ends = {path: [line for line in lines if line][-2:] for path, lines in begun.items()}
        assert time.monotonic() - killed < 10
        answer = waiting.result()
    for path in (COMPLETIONS, CHAT):
        error, done = ends[path]
        assert json.loads(error.removeprefix("data: "))["error"] == {
            "message": LOST,
            "type": "server_error",
            "param": None,
            "code": "replica_lost",
        }
        assert done == "data: [DONE]"
    kind, data = ends[RESPONSES]
    response = json.loads(data.removeprefix("data: "))["response"]
    assert (kind, response["status"], response["error"]["message"]) == ("event: response.failed", "failed", LOST)
    assert (answer.status_code, answer.headers["x-replica"]) == (200, other)
    assert answer.json()["choices"] == alone
    app.wait_for(2, without=[dying])  # a new one is there by itself


def test_a_stream_without_a_token_is_answered_elsewhere(app: App) -> None:
    dying, other = sorted(app.processes())
    full, waits = text_of(app, COMPLETIONS, dying), text_of(app, CHAT, dying)
    with ExitStack() as held, ThreadPoolExecutor(1) as clients:
        lines = begin(app, COMPLETIONS, full, held, n=SLOTS)

        def ask() -> tuple[str, list[str]]:
            with app.stream(CHAT, body_of(CHAT, waits) | {"max_tokens": 4}) as answer:
                return answer.headers["x-replica"], [line for line in answer.iter_lines() if line]

        waiting = clients.submit(ask)
        wait_until(lambda: app.metrics("xgdn_requests_waiting")[dying] == 1)
        app.kill(dying)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        replica, whole = waiting.result()
    assert replica == other
    assert sum('"role": "assistant"' in line for line in whole) == 1
    assert (whole[-1], any("error" in line for line in whole)) == ("data: [DONE]", False)
    app.wait_for(2, without=[dying])


def test_without_a_replica_requests_wait_for_a_new_one(app: App) -> None:
    names = list(app.processes())
    for name in names:
        app.kill(name)
    refused = app.get("/ready")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
    assert refused.json()["error"]["message"] == "No replica took the request within 1 seconds."
    with ThreadPoolExecutor(2 * QUEUE) as clients:
        asked = [clients.submit(app.post, COMPLETIONS, {"prompt": "a", "max_tokens": 2}) for _ in range(2 * QUEUE)]
        answers = [it.result() for it in asked]
    taken = [it.json()["usage"]["completion_tokens"] for it in answers if it.status_code == 200]
    full = [it.json()["error"] for it in answers if it.status_code == 429]
    assert len(taken) + len(full) == 2 * QUEUE
    assert set(taken) == {2}
    assert (full[0]["code"], full[0]["message"]) == (
        "queue_full",
        f"The queue is full: {QUEUE} requests wait for a replica.",
    )
    app.wait_for(2, without=names)


def test_versions_that_do_not_go_together_are_refused(run: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Arguments(model=EXAMPLES / "tiny_model/checkpoint")
    replica = serve.deployment(max_constructor_retry_count=1)(Replica).bind(arguments, "9.9")
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="Deploying application mismatch failed"):
        serve.run(replica, name="mismatch", route_prefix="/mismatch")
    assert time.monotonic() - begun < 10
    *_, last = serve.status().applications["mismatch"].deployments["Replica"].message.splitlines()
    said = "RuntimeError: xgdn: expected version 9.9, as where the application was deployed, got "
    assert last == said + xgdn_version()
    monkeypatch.setattr(ray, "__version__", "3.0.0")
    with pytest.raises(RuntimeError, match=r"^ray: expected version 2\.60, got 3\.0\.0$"):
        build(arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda it: it.name)
def test_the_command_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    serve_command = [str(Path(sys.executable).with_name("serve")), "run", "ray_serve.app:build"]
    options = ["model=tiny_model/checkpoint", "dtype=float32", "min_replicas=2"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([*serve_command, *options], cwd=EXAMPLES, stdout=log, stderr=log) as process,
    ):
        ready = "http://127.0.0.1:8000/ready"
        wait_until(lambda: is_ready(ready), RESTART_SECONDS)
        children = psutil.Process(process.pid).children(recursive=True)
        assert sum("ServeReplica:default:Replica" in " ".join(it.cmdline()) for it in children) == 2
        process.send_signal(number)
        process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, [it.cmdline() for it in alive]


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
