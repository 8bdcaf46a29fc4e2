# SPDX-License-Identifier: Apache-2.0
"""examples/ray_serve without Ray: where requests go, and what clients get when replicas die. With it: tests/ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from live_server import CHECKPOINT
from ray_serve.arguments import Arguments
from ray_serve.prefix_policy import PrefixPolicy
from ray_serve.relay import Message, ReplicaLost, relay
from ray_serve.replica_metrics import with_replica_label
from ray_serve.route import Route, route_of
from ray_serve.versions import check_ray, check_xgdn, xgdn_version
from xgdn.server.api_error import ApiError

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def keys(path: str = CHAT, **body: Any) -> tuple[int, ...]:
    return route_of(path, json.dumps(body).encode(), lambda _: None).keys


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM = says("system", "You are short.")


def test_every_turn_of_a_conversation_begins_with_the_keys_of_the_one_before() -> None:
    messages = [SYSTEM, says("user", "one")]
    before = keys(messages=messages)
    assert len(before) == 1
    for turn in range(3):
        messages += [says("assistant", f"answer {turn}" * 100), says("user", f"more {turn}")]
        now = keys(messages=messages)
        assert now[: len(before)] == before
        assert len(now) > len(before)
        before = now


def test_what_precedes_a_conversation_tells_it_apart_but_is_no_part_that_it_shares() -> None:
    alike = {"messages": [SYSTEM, says("user", "one")]}
    first = keys(**alike)
    others = [
        keys(messages=[says("developer", "Be long."), says("user", "one")]),
        keys(messages=[says("user", "one")]),
        keys(**alike, tools=[{"type": "function", "function": {"name": "f"}}]),
        keys(messages=[SYSTEM, says("user", "two")]),
    ]
    assert not set(first).intersection(*others)
    assert len({first, *others}) == 5
    assert keys(**alike, temperature=0.5, stream=True) == first


@pytest.mark.parametrize("prompt", ["word " * 200, [1, 2, 3] * 100, ["word " * 200, "other"], [[1, 2, 3] * 100]])
def test_a_long_prompt_has_a_key_for_every_block(prompt: Any) -> None:
    found = keys(COMPLETIONS, prompt=prompt)
    one = prompt[0] if isinstance(prompt[0], list | str) and not isinstance(prompt, str) else prompt
    grown = one + (one if isinstance(one, list) else "and more")
    assert len(found) > 3
    assert keys(COMPLETIONS, prompt=grown)[: len(found) - 1] == found[:-1]  # the last block was not full


def test_items_and_instructions_of_responses() -> None:
    first = keys(RESPONSES, instructions="Be short.", input=[says("user", "one")])
    assert keys(RESPONSES, instructions="Be short.", input=[says("user", "one"), says("user", "two")])[:1] == first
    assert keys(RESPONSES, instructions="Be long.", input=[says("user", "one")]) != first


def test_stored_responses_are_where_they_were_written() -> None:
    homes = {"resp_1": "a"}
    body = json.dumps({"input": "more", "previous_response_id": "resp_1"}).encode()
    assert route_of(RESPONSES, body, homes.get).replica == "a"
    assert route_of(CHAT, body, homes.get).replica is None
    assert route_of(f"{RESPONSES}/resp_1", b"", homes.get).replica == "a"
    assert route_of(f"{RESPONSES}/resp_2", b"", homes.get) == Route()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff",
        b"[1]",
        b"null",
        b'{"messages": 5}',
        b'{"messages": [5, {}]}',
        b'{"prompt": []}',
        b'{"previous_response_id": [1], "input": {}}',
        b'{"prompt": "\\ud800"}',
        b'{"messages": [{"role": []}, null]}',
    ],
)
def test_whatever_a_body_holds_it_has_a_route(body: bytes) -> None:
    assert route_of(RESPONSES, body, {}.get).replica is None


def route(*prefix: int) -> Route:
    return Route(prefix)


def test_a_conversation_stays_however_busy_others_are() -> None:
    policy = PrefixPolicy(max_imbalance=4, max_requests=9)
    (home, other) = policy.rank(route(1), ["a", "b"])
    policy.begin("first", route(1), home)
    policy.end("first", home)
    for turn in range(3):
        policy.begin(f"busy {turn}", route(100 + turn), home)
        assert policy.rank(route(1, *range(2, 3 + turn)), ["a", "b"]) == [home, other]


def test_a_new_conversation_goes_to_the_least_busy() -> None:
    policy = PrefixPolicy(max_imbalance=4, max_requests=9)
    policy.begin("1", route(1), "a")
    assert [policy.rank(route(key), ["a", "b", "c"])[-1] for key in range(50, 60)] == ["a"] * 10
    policy.begin("2", route(2), "b")
    assert {policy.rank(route(key), ["a", "b", "c"])[0] for key in range(50, 60)} == {"c"}
    policy.end("1", "a")
    policy.end("1", "a")  # of a request that is gone already: nothing
    policy.end("other", "c")
    assert {policy.rank(route(key), ["a", "b"])[0] for key in range(50, 60)} == {"a"}


def test_one_that_is_far_busier_is_passed_over_and_both_know_the_prefix_then() -> None:
    policy = PrefixPolicy(max_imbalance=2, max_requests=9)
    policy.begin("1", route(1), "a")
    assert policy.rank(route(1, 2), ["a", "b"])[0] == "a"
    policy.begin("2", route(5), "a")
    assert policy.rank(route(1, 2), ["a", "b"])[0] == "b"
    policy.begin("3", route(1, 2), "b")
    policy.end("1", "a")
    policy.end("2", "a")
    assert policy.rank(route(1, 2, 3), ["a", "b"])[0] == "b"  # the longest beginning counts
    assert policy.rank(route(1, 9), ["a", "b"])[0] == "a"  # of those that hold it, the least busy


def test_a_stored_response_waits_for_its_replica_and_goes_anywhere_without_it() -> None:
    policy = PrefixPolicy(max_imbalance=1, max_requests=9)
    for i in range(8):
        policy.begin(str(i), route(i), "a")
    assert policy.rank(Route((), "a"), ["a", "b"]) == ["a"]
    policy.begin("8", route(8), "a")
    assert policy.rank(Route((), "a"), ["a", "b"]) == []
    assert policy.rank(Route((), "gone"), ["a", "b"]) == ["b"]


def test_a_full_replica_takes_nothing() -> None:
    policy = PrefixPolicy(max_imbalance=9, max_requests=2)
    policy.begin("1", route(1), "a")
    policy.begin("2", route(2), "a")
    assert policy.rank(route(1, 2), ["a", "b"]) == ["b"]
    assert policy.rank(route(1, 2), ["a"]) == []
    policy.end("2", "a")
    assert policy.rank(route(1, 2), ["a", "b"]) == ["a", "b"]


def test_few_conversations_move_when_replicas_come_and_go() -> None:
    policy = PrefixPolicy(max_imbalance=4, max_requests=9)
    replicas = ["a", "b", "c"]

    def homes(names: Sequence[str], policy: PrefixPolicy = policy) -> dict[int, str]:
        return {key: policy.rank(route(key, key + 1), names)[0] for key in range(0, 2000, 2)}

    first = homes(replicas)
    assert all(250 < list(first.values()).count(name) < 420 for name in replicas)
    assert homes(replicas, PrefixPolicy(max_imbalance=4, max_requests=9)) == first  # of another gateway, or a new one
    for key, name in first.items():
        policy.begin("it", route(key), name)
        policy.end("it", name)
    assert homes([*replicas, "d"]) == first
    without = homes(["a", "c", "d"])
    assert all(without[key] == name for key, name in first.items() if name != "b")
    assert set(without.values()) == {"a", "c", "d"}


def test_requests_without_a_prompt_are_spread() -> None:
    policy = PrefixPolicy(max_imbalance=4, max_requests=9)
    assert {policy.rank(Route(), ["a", "b"])[0] for _ in range(20)} == {"a", "b"}


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    policy = PrefixPolicy(max_imbalance=4, max_requests=9, max_keys=2)
    foreign = {key: policy.rank(route(key), ["a", "b"])[1] for key in (1, 2, 3)}  # not where it would go by itself
    for key in (1, 2):
        policy.begin("it", route(key), foreign[key])
        policy.end("it", foreign[key])
    assert policy.rank(route(1), ["a", "b"])[0] == foreign[1]
    policy.begin("it", route(3), foreign[3])
    policy.end("it", foreign[3])
    assert [policy.rank(route(key), ["a", "b"])[0] == foreign[key] for key in (1, 2, 3)] == [True, False, True]


# ---- answers --------------------------------------------------------------------------------------------------------


def start(content_type: str, status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode())]}


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def event(kind: str | None = None, **document: Any) -> Message:
    head = "" if kind is None else f"event: {kind}\n"
    return part(f"{head}data: {json.dumps(document)}\n\n".encode())


STREAM = start("text/event-stream; charset=utf-8")
ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
TOKEN = event(choices=[{"index": 0, "delta": {"content": "a"}}])
TEXT = event(choices=[{"index": 0, "text": "a"}])
CREATED = event(
    "response.created", response={"id": "resp_1", "status": "in_progress", "error": None}, sequence_number=0
)
IN_PROGRESS = event("response.in_progress", response={}, sequence_number=1)
ITEM = event("response.output_item.added", sequence_number=2)
DONE = part(b"data: [DONE]\n\n")
END = part(b"", more=False)
COMMENT = part(b": keep-alive\n\n")
DIES: Message = {"type": "dies"}


def relayed(*answers: Sequence[Message]) -> tuple[list[Message], int]:
    """What the client gets when one replica after the other answers so, and how many were asked."""
    left = list(answers)
    sent: list[Message] = []

    async def ask() -> AsyncGenerator[Message, None]:
        for message in left.pop(0):
            if message is DIES:
                raise ReplicaLost("died")
            yield message

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(relay(ask, send))
    return sent, len(answers) - len(left)


@pytest.mark.parametrize(
    "begun",
    [
        [],
        [start("application/json")],
        [start("application/json"), part(b'{"a"')],
        [STREAM],
        [STREAM, ROLE, ROLE],
        [STREAM, CREATED, IN_PROGRESS],
    ],
    ids=lambda begun: str(len(begun)),
)
def test_an_answer_without_a_token_is_asked_for_again_and_sent_once(begun: list[Message]) -> None:
    whole = [STREAM, ROLE, TOKEN, DONE, END]
    assert relayed([*begun, DIES], whole) == (whole, 2)


@pytest.mark.parametrize("first", [[ROLE, TOKEN], [TEXT], [ROLE, COMMENT]], ids=["chat", "completion", "comment"])
def test_a_stream_that_had_begun_ends_with_an_error_and_done(first: list[Message]) -> None:
    sent, asked = relayed([STREAM, *first, DIES], [STREAM, TOKEN, DONE, END])
    assert asked == 1
    assert sent[:-1] == [STREAM, *first]
    error, done, rest = sent[-1]["body"].decode().split("\n\n")
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {
            "message": "The replica that wrote this answer died.",
            "type": "server_error",
            "param": None,
            "code": "replica_lost",
        }
    }
    assert (done, rest, sent[-1]["more_body"]) == ("data: [DONE]", "", False)


def test_a_stream_of_responses_ends_as_failed() -> None:
    sent, asked = relayed([STREAM, CREATED, IN_PROGRESS, ITEM, COMMENT, DIES])
    assert (asked, sent[:-1]) == (1, [STREAM, CREATED, IN_PROGRESS, ITEM, COMMENT])
    head, data, *rest = sent[-1]["body"].decode().split("\n")
    assert (head, rest) == ("event: response.failed", ["", ""])
    message = "The replica that wrote this answer died."
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "response.failed",
        "sequence_number": 3,
        "response": {"id": "resp_1", "status": "failed", "error": {"code": "server_error", "message": message}},
    }


def test_a_token_is_sent_when_it_comes() -> None:
    sent: list[Message] = []
    seen = []

    async def ask() -> AsyncGenerator[Message, None]:
        for message in (STREAM, ROLE, TOKEN, TOKEN, DONE, END):
            yield message
            seen.append(len(sent))

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(relay(ask, send))
    assert seen == [0, 0, 3, 4, 5, 6]


def test_an_error_is_no_stream_that_had_begun() -> None:
    refused = [start("application/json", 400), part(b'{"error": {}}', more=False)]
    assert relayed([start("application/json", 400), DIES], refused) == (refused, 2)


def test_an_answer_without_a_content_type_comes_through() -> None:
    answer = [{"type": "http.response.start", "status": 304, "headers": [(b"etag", b"1")]}, END]
    assert relayed(answer) == (answer, 1)


def test_when_every_replica_dies_it_is_said() -> None:
    with pytest.raises(ApiError, match=r"^3 replicas that took this request died, one after the other\.$") as caught:
        relayed([DIES], [STREAM, DIES], [STREAM, ROLE, DIES])
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")
    assert caught.value.headers == {"Retry-After": "1"}


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_metrics_have_their_replica() -> None:
    text = """# HELP xgdn_errors_total Errors.
# TYPE xgdn_errors_total counter
xgdn_errors_total{type="queue_full"} %d.0
# HELP xgdn_wait_seconds Wait.
# TYPE xgdn_wait_seconds histogram
xgdn_wait_seconds_bucket{le="+Inf"} 3.0
xgdn_wait_seconds_count 3.0
xgdn_wait_seconds_sum 1.5
"""
    whole = with_replica_label({"a": text % 1, "b": text % 2}).decode()
    assert whole.count("# TYPE xgdn_errors_total counter") == whole.count("# TYPE xgdn_wait_seconds histogram") == 1
    samples = [it for family in text_string_to_metric_families(whole) for it in family.samples]
    errors = {it.labels["replica"]: it.value for it in samples if it.name == "xgdn_errors_total"}
    assert errors == {"a": 1, "b": 2}
    assert [it.labels["replica"] for it in samples if it.name == "xgdn_wait_seconds_sum"] == ["a", "b"]


def test_arguments() -> None:
    arguments = Arguments.model_validate({"model": str(CHECKPOINT), "threads": "2", "dtype": "float32"})
    assert (arguments.threads, arguments.settings().model_name) == (2, "checkpoint")
    assert str(arguments.engine_args().dtype) == "torch.float32"
    for wrong, said in (
        ({"min_replicas": 3}, "max_replicas: expected at least min_replicas, 3, got 2"),
        ({"thread": 2}, "Extra inputs are not permitted"),
        ({"routing": "random"}, "'prefix' or 'load'"),
    ):
        with pytest.raises(ValidationError, match=said):
            Arguments.model_validate({"model": str(CHECKPOINT), **wrong})


def test_versions_that_do_not_go_together_are_refused() -> None:
    check_ray("2.60.3")
    with pytest.raises(RuntimeError, match=r"^ray: expected version 2\.60, got 2\.6\.1$"):
        check_ray("2.6.1")
    check_xgdn(xgdn_version())
    with pytest.raises(
        RuntimeError, match=r"^xgdn: expected version 9\.9, as where the application was deployed, got "
    ):
        check_xgdn("9.9")
