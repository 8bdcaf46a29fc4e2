# SPDX-License-Identifier: Apache-2.0
"""`xgdn bench serving`: workload, statistics, a client that meets failing servers, agreement with /metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from xgdn.bench import server_process
from xgdn.bench.client import LoadClient, ServerError, Target
from xgdn.bench.server_metrics import compare
from xgdn.bench.server_process import running_server, vocab_size
from xgdn.bench.serving import ServingBenchmark, WrongAnswer, problems
from xgdn.bench.timeline import Answer, Comparison, Distribution, ServingRow
from xgdn.bench.workload import Lengths, LoadPlan, LoadRequest, Workload
from xgdn.cli import app

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_model/checkpoint"
FLOAT32 = ["--dtype", "float32"]


def workload(count: int = 50, **changes: Any) -> Workload:
    options = {"prompt_tokens": Lengths(3, 9), "output_tokens": Lengths(2, 5), "vocab_size": 100, "seed": 7}
    return Workload(count, **(options | changes))


# The workload.


def test_a_seed_fixes_arrivals_lengths_and_ids() -> None:
    first, again, other = workload(), workload(), workload(seed=8)
    assert first.requests == again.requests
    assert first.arrivals(3.0) == again.arrivals(3.0)
    assert first.requests != other.requests
    assert first.arrivals(3.0) != other.arrivals(3.0)


def test_each_kind_of_draw_is_by_itself() -> None:
    plain, longer = workload(), workload(output_tokens=Lengths(50, 90))
    assert [r.prompt for r in plain.requests] == [r.prompt for r in longer.requests]
    assert plain.arrivals(1.0) == longer.arrivals(1.0)
    shorter = workload(20)
    assert shorter.requests == plain.requests[:20]
    assert shorter.arrivals(1.0) == plain.arrivals(1.0)[:20]


def test_lengths_and_ids_fill_their_ranges() -> None:
    requests = workload(2000).requests
    assert {len(r.prompt) for r in requests} == set(range(3, 10))
    assert {r.max_tokens for r in requests} == set(range(2, 6))
    assert {token for r in requests for token in r.prompt} == set(range(100))


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = workload(20_000, prompt_tokens=Lengths(1, 1)).arrivals(4.0)
    gaps = [later - earlier for earlier, later in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) > 0
    # Exponential: mean and standard deviation 1 / rate; the share above t is exp(-rate t). Five standard errors.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=5 / math.sqrt(20_000))
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2), abs=0.013)
    assert workload().arrivals(2.0) == pytest.approx([4 * time for time in workload().arrivals(8.0)])
    assert workload(3).arrivals(math.inf) == [0.0] * 3


def test_a_sample_is_spread_over_the_workload() -> None:
    assert workload(10).sample(4) == [0, 2, 5, 7]
    assert workload(3).sample(8) == [0, 1, 2]


# The statistics.


def test_percentiles_of_known_values() -> None:
    assert Distribution.of([float(value) for value in range(100, -1, -1)]) == Distribution(
        count=101, mean=50.0, p50=50.0, p90=90.0, p95=95.0, p99=99.0, max=100.0
    )
    # Between two values by the straight line: place 0.9 x 3 = 2.7 of 0, 1, 2, 3.
    four = Distribution.of([40.0, 10.0, 20.0, 30.0])
    assert four is not None
    assert (four.p50, four.p90, four.p95) == pytest.approx((25.0, 37.0, 38.5))
    assert Distribution.of([3.0]) == Distribution(1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0)
    assert Distribution.of([]) is None


def answered(**changes: Any) -> Answer:
    """Sent at 1.5 s instead of at 1 s; five tokens, two of which came in the event of another; done at 4 s."""
    plain = {
        "num_prompt_tokens": 10, "num_asked": 5, "scheduled": 0.75, "due": 1.0, "sent": 1.5, "end": 4.0,
        "arrivals": [2.0, 2.25, 3.25], "num_tokens": 5, "text": "abcde", "finish_reason": "length", "status": 200,
    }  # fmt: skip
    return Answer(**(plain | changes))


SHORT = {"sent": 1.0, "end": 3.0, "arrivals": [1.5, 2.0], "num_tokens": 2, "finish_reason": "stop"}
NOTHING = {"finish_reason": None, "text": ""}
REFUSED = NOTHING | {"sent": 2.0, "end": 2.5, "arrivals": [], "num_tokens": 0, "status": 429, "error": "queue_full"}
BROKEN = NOTHING | {"sent": 1.0, "end": 6.0, "arrivals": [2.0], "num_tokens": 1, "error": "ReadTimeout"}


def row_of(answers: list[Answer], **changes: Any) -> ServingRow:
    options: dict[str, Any] = {"rate": 2.0, "planned": len(answers), "equal": [True, True], "metrics": None}
    return ServingRow.of(answers=answers, **(options | changes))


def test_gaps_are_one_fewer_than_tokens_and_add_up() -> None:
    answer = answered()
    assert sorted(answer.gaps()) == [0.0, 0.0, 0.25, 1.0]
    assert answer.num_shared == 2
    assert sum(answer.gaps()) == answer.arrivals[-1] - answer.arrivals[0]
    assert answered(arrivals=[2.0], num_tokens=1).gaps() == []


def test_a_row_of_known_timelines() -> None:
    row = row_of([answered(), answered(**SHORT), answered(**REFUSED), answered(**BROKEN)])
    assert (row.sent, row.finished, row.short, row.failed) == (4, 2, 1, 2)
    assert row.errors == {"429 queue_full": 1, "ReadTimeout": 1}
    assert (row.prompt_tokens, row.tokens_asked, row.tokens_received) == (20, 20, 8)
    assert row.tokens_sharing_an_event == 2
    assert row.seconds == 5.0  # from 1 s, the first that was sent, to 6 s
    assert row.requests_per_second == 2 / 5
    assert row.output_tokens_per_second == 8 / 5
    assert row.total_tokens_per_second == 28 / 5
    assert row.ttft is not None
    assert (row.ttft.count, row.ttft.p50, row.ttft.max) == (3, 0.5, 1.0)  # 0.5, 0.5, and 1.0 of the broken one
    assert row.itl is not None
    assert (row.itl.count, row.itl.mean, row.itl.p50, row.itl.max) == (5, 0.35, 0.25, 1.0)
    assert row.tpot is not None
    assert (row.tpot.count, row.tpot.mean) == (2, statistics.mean([1.25 / 4, 0.5]))
    assert row.e2e is not None
    assert (row.e2e.count, row.e2e.p50, row.e2e.max) == (2, 2.25, 2.5)
    assert row.lag is not None
    assert (row.lag.count, row.lag.max) == (4, 1.0)  # 0.5, 0, 1, 0
    assert row.held is not None
    assert (row.held.mean, row.held.max) == (0.25, 0.25)


def test_a_row_without_an_answer_has_no_latencies() -> None:
    row = row_of([answered(**REFUSED)])
    assert (row.ttft, row.itl, row.tpot, row.e2e) == (None, None, None, None)
    assert row.output_tokens_per_second == 0
    assert json.loads(json.dumps(dataclasses.replace(row, rate=math.inf).document()))["rate"] == "inf"


def test_problems_are_said() -> None:
    sound = row_of([answered()])
    assert problems(sound, 1.0) == []
    assert problems(dataclasses.replace(sound, planned=2), 1.0) == [
        "rate 2: 2 requests were to be sent, 1 are accounted for"
    ]
    half = row_of([answered()], equal=[True, False])
    assert "1 of 2 answers under load differ" in problems(half, 0.6)[0]
    assert problems(half, 0.5) == []
    off = row_of([answered()], metrics=[Comparison("xgdn_a", 3, 3, 3), Comparison("xgdn_b", 3, 5, 2)])
    assert problems(off, 1.0) == ["rate 2: the server's xgdn_b grew by 2, by the answers it must be 3 to 5"]


# The comparison with /metrics.

COUNTED = {
    "xgdn_prompt_tokens_total": 20,
    "xgdn_generated_tokens_total": 7,
    "xgdn_time_to_first_token_seconds_count": 2,
    "xgdn_inter_token_seconds_count": 5,
    'xgdn_finished_total{reason="length"}': 1,
    'xgdn_finished_total{reason="stop"}': 1,
    'xgdn_errors_total{type="queue_full"}': 1,
}


@pytest.mark.parametrize("name", [*COUNTED, None])
def test_each_figure_is_compared_exactly(name: str | None) -> None:
    before = {"xgdn_prompt_tokens_total": 100, 'xgdn_errors_total{type="queue_full"}': 4}
    after = {key: count + before.get(key, 0) for key, count in COUNTED.items()}
    answers = [answered(), answered(**SHORT), answered(**REFUSED)]
    for change in (-1, 1):
        changed = after if name is None else after | {name: after[name] + change}
        figures = compare(before, changed, answers)
        assert {figure.name for figure in figures} == set(COUNTED)
        assert [figure.name for figure in figures if not figure.agrees] == [name] * (name is not None)


def test_what_clients_and_servers_alone_know_of_is_compared_too() -> None:
    cancelled = COUNTED | {'xgdn_finished_total{reason="cancelled"}': 1}
    answers = [answered(), answered(**SHORT), answered(**REFUSED)]
    assert [figure for figure in compare({}, cancelled, answers) if not figure.agrees] == [
        Comparison('xgdn_finished_total{reason="cancelled"}', 0, 0, 1)
    ]
    untold = {name: count for name, count in COUNTED.items() if "queue_full" not in name}
    assert [figure for figure in compare({}, untold, answers) if not figure.agrees] == [
        Comparison('xgdn_errors_total{type="queue_full"}', 1, 1, 0)
    ]


def test_an_answer_that_broke_off_leaves_a_range_open() -> None:
    answers = [answered(), answered(**SHORT), answered(**REFUSED), answered(**BROKEN)]
    for name, most in {"xgdn_prompt_tokens_total": 30, "xgdn_generated_tokens_total": 12}.items():
        for count, agrees in ((COUNTED[name] - 1, False), (COUNTED[name], True), (most, True), (most + 1, False)):
            figures = compare({}, COUNTED | {name: count}, answers)
            assert {figure.name: figure.agrees for figure in figures} == dict.fromkeys(COUNTED, True) | {name: agrees}


# The client, against servers made of a function.

USAGE = {"usage": {"completion_tokens": 3}, "choices": []}


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def stream(*events: Any) -> httpx.Response:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n" for event in events]
    return httpx.Response(200, text="".join(lines))


DONE = "data: [DONE]\n\n"
REQUESTS = [LoadRequest([1, 2], 3), LoadRequest([4], 3)]


def ask(respond: Callable[[httpx.Request], httpx.Response], **options: Any) -> list[Answer]:
    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(respond)) as http:
            return await LoadClient(http, "it", ignore_eos=True).run(REQUESTS, [0.0, 0.0], **options)

    return asyncio.run(run())


def test_the_client_sends_greedy_streams_of_token_ids() -> None:
    bodies = []

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://server/v1/completions"
        bodies.append(json.loads(request.content))
        return stream(piece("a"), piece("b"), piece("c", "length"), USAGE, DONE)

    answers = ask(respond)
    assert [answer.content for answer in answers] == [("abc", 3, "length")] * 2
    assert [len(answer.arrivals) for answer in answers] == [3, 3]
    assert [answer.is_short for answer in answers] == [False, False]
    for answer in answers:
        assert answer.sent <= answer.arrivals[0] <= answer.arrivals[1] <= answer.arrivals[2] <= answer.end
    assert sorted(bodies, key=lambda body: -len(body["prompt"])) == [
        {
            "model": "it", "prompt": prompt, "max_tokens": 3, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True,
        }
        for prompt in ([1, 2], [4])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "num_arrivals", "gaps"),
    [
        ([piece("ab"), piece("c", "length")], 2, 2),  # two tokens in one event
        ([piece("a"), piece(""), piece("b"), piece("", "length")], 3, 2),  # the last token has no text
        ([piece("a"), piece("b"), piece("c"), piece("", "length")], 3, 2),  # an event for the end alone
        ([piece("", "length")], 1, 2),  # no text at all
        ([": a comment\n\n", piece("a"), 'data:{"choices": []}\n\n', piece("bc", "length")], 2, 2),
    ],
)
def test_tokens_arrive_with_the_event_of_their_text_or_the_next(
    events: list[Any], num_arrivals: int, gaps: int
) -> None:
    answer = ask(lambda _: stream(*events, USAGE, DONE))[0]
    assert (answer.is_finished, answer.num_tokens) == (True, 3)
    assert len(answer.arrivals) == num_arrivals
    assert len(answer.gaps()) == gaps


def refuse(_: httpx.Request) -> httpx.Response:
    return httpx.Response(429, json={"error": {"code": "queue_full", "message": "full"}})


def time_out(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("silence", request=request)


@pytest.mark.parametrize(
    ("respond", "failure", "is_refused", "num_tokens"),
    [
        (refuse, "429 queue_full", True, 0),
        (lambda _: httpx.Response(502, text="<html>"), "502 Bad Gateway", True, 0),
        (time_out, "ReadTimeout", False, 0),
        (lambda _: stream(piece("a"), {"error": {"code": "engine_error", "message": ""}}), "engine_error", False, 1),
        (lambda _: stream(piece("a"), piece("b")), "a stream without an end", False, 2),
        (lambda _: stream(piece("a"), USAGE, DONE), "a stream without an end", False, 1),
        (lambda _: stream(piece("a", "length"), DONE), "a stream without usage", False, 1),
        (lambda _: stream(piece("a"), "data: {\n\n", USAGE, DONE), "an event that is none of OpenAI's", False, 1),
    ],
)
def test_what_goes_wrong_with_a_request_is_in_its_answer(
    respond: Callable[[httpx.Request], httpx.Response], failure: str, is_refused: bool, num_tokens: int
) -> None:
    for answer in ask(respond):
        assert (answer.is_finished, answer.failure, answer.is_refused) == (False, failure, is_refused)
        assert answer.num_tokens == num_tokens
        assert answer.end >= answer.sent


def test_a_server_that_is_silent_fails_the_request() -> None:
    async def run(url: str) -> list[Answer]:
        async with Target(url, timeout=0.2).connect() as http:
            assert http.timeout == httpx.Timeout(0.2)
            return await LoadClient(http, "it", ignore_eos=True).run(REQUESTS, [0.0, 0.0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answers = asyncio.run(run(url))
    assert [answer.failure for answer in answers] == ["ReadTimeout"] * 2
    assert [answer.failure for answer in asyncio.run(run(url))] == ["ConnectError"] * 2


class CountingTransport(httpx.AsyncBaseTransport):
    """Knows how many requests were under way at most; each takes a few turns of the event loop."""

    num_running = 0
    most = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        await asyncio.sleep(0.01)
        self.num_running -= 1
        return stream(piece("a", "length"), USAGE, DONE)


@pytest.mark.parametrize(("limit", "most"), [(None, 12), (3, 3)])
def test_a_limit_of_concurrency_holds_requests_back(limit: int | None, most: int) -> None:
    transport = CountingTransport()

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as http:
            client = LoadClient(http, "it", ignore_eos=False)
            return await client.run(workload(12).requests, [0.0] * 12, max_concurrency=limit)

    answers = asyncio.run(run())
    assert transport.most == most
    held = [answer.due - answer.scheduled for answer in answers]
    assert sum(time > 0 for time in held) == 12 - most
    assert max(held) == (0 if limit is None else sorted(answer.end for answer in answers)[8])
    assert all(answer.sent >= answer.due for answer in answers)


def test_a_client_that_is_late_shows_it() -> None:
    """The first request keeps the event loop, so that the second is sent after its time."""

    def respond(_: httpx.Request) -> httpx.Response:
        time.sleep(0.05)
        return stream(piece("a", "length"), USAGE, DONE)

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(respond)) as http:
            return await LoadClient(http, "it", ignore_eos=False).run(REQUESTS, [0.0, 0.01])

    first, second = asyncio.run(run())
    assert second.due == 0.01
    assert second.sent - second.due >= 0.05 - 0.01 - 0.001
    row = row_of([first, second])
    assert row.lag is not None
    assert row.lag.max == pytest.approx(max(second.sent - 0.01, first.sent))


# A server that answers wrongly.


def benchmark_of(
    respond: Callable[[dict[str, Any]], httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> list[ServingRow]:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(404)
        return respond(json.loads(request.content))

    client = httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(handle))
    monkeypatch.setattr(Target, "connect", lambda _: client)
    load = workload(6, output_tokens=Lengths(3, 3))
    return ServingBenchmark(Target("http://server", "it"), load, LoadPlan([math.inf], check=2)).run()


def test_answers_under_load_must_be_those_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = 0

    def respond_from(first_wrong: int) -> Callable[[dict[str, Any]], httpx.Response]:
        def respond(body: dict[str, Any]) -> httpx.Response:
            nonlocal answers
            answers += 1
            text = f"{len(body['prompt'])} tokens" if answers <= first_wrong else "cut"
            return stream(piece(text, "length"), USAGE, DONE)

        return respond

    with pytest.raises(WrongAnswer, match="2 of 2 answers under load differ"):
        benchmark_of(respond_from(2), monkeypatch)
    answers = 0
    (row,) = benchmark_of(respond_from(4), monkeypatch)
    assert (row.compared, row.equal) == (2, 0)
    assert "2 of 2 answers under load differ" in problems(row, 1.0)[0]
    answers = 0
    (row,) = benchmark_of(respond_from(1000), monkeypatch)
    assert (row.sent, row.finished, row.compared, row.equal, row.metrics) == (6, 6, 2, 2, None)
    assert problems(row, 1.0) == []


def test_a_shorter_answer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {"usage": {"completion_tokens": 2}, "choices": []}
    (row,) = benchmark_of(lambda _: stream(piece("a"), piece("b", "length"), usage, DONE), monkeypatch)
    assert (row.finished, row.short) == (6, 6)
    assert (row.tokens_asked, row.tokens_received) == (18, 12)


def test_a_sample_that_fails_alone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    error = {"code": "unknown_parameter", "message": "not known"}
    with pytest.raises(ServerError, match="a request of the sample failed: 400 unknown_parameter: not known"):
        benchmark_of(lambda _: httpx.Response(400, json={"error": error}), monkeypatch)


# Whole runs.


def run(*arguments: object) -> Result:
    return CliRunner(env={"FORCE_COLOR": None}).invoke(app, ["bench", "serving", *map(str, arguments)])


SMALL = ["--prompt-tokens", "1-40", "--output-tokens", "1-12"]


def test_a_load_is_counted_alike_by_the_client_and_by_metrics() -> None:
    options = [*FLOAT32, "--model-name", "not http://127.0.0.1:1"]  # a server may be called anything
    result = run(CHECKPOINT, "--rate", "60,inf", "--requests", 40, *SMALL, "--json", "--", *options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    want = Workload(40, prompt_tokens=Lengths(1, 40), output_tokens=Lengths(1, 12), vocab_size=2048, seed=0).requests
    tokens = sum(request.max_tokens for request in want)
    assert [row["rate"] for row in document["rows"]] == [60.0, "inf"]
    for row in document["rows"]:
        assert (row["sent"], row["finished"], row["short"], row["failed"], row["errors"]) == (40, 40, 0, 0, {})
        assert row["prompt_tokens"] == sum(len(request.prompt) for request in want)
        assert row["tokens_received"] == row["tokens_asked"] == tokens
        assert (row["compared"], row["equal"]) == (8, 8)
        assert (row["ttft"]["count"], row["e2e"]["count"], row["itl"]["count"]) == (40, 40, tokens - 40)
        figures = {figure["name"]: figure["server"] for figure in row["metrics"]}
        assert figures == {
            "xgdn_prompt_tokens_total": row["prompt_tokens"],
            "xgdn_generated_tokens_total": tokens,
            "xgdn_time_to_first_token_seconds_count": 40,
            "xgdn_inter_token_seconds_count": tokens - 40,
            'xgdn_finished_total{reason="length"}': 40,
        }
        assert all(figure["lowest"] == figure["server"] == figure["highest"] for figure in row["metrics"])


@pytest.fixture(scope="module")
def crowded() -> Iterator[str]:
    """A server of two slots and a queue of two."""
    with running_server(CHECKPOINT, [*FLOAT32, "--max-batch-size", "2", "--max-queue", "2"], "the key") as url:
        yield url


def test_refusals_are_counted_by_both(crowded: str) -> None:
    load = Workload(40, prompt_tokens=Lengths(1, 40), output_tokens=Lengths(1, 12), vocab_size=2048, seed=1)
    plan = LoadPlan([math.inf], check=4)
    (row,) = ServingBenchmark(Target(crowded, api_key="the key"), load, plan).run()
    assert row.errors == {"429 queue_full": row.failed}
    assert row.failed > 0
    assert row.finished > 0
    assert row.finished + row.failed == row.sent == 40
    assert row.metrics is not None
    figures = {figure.name: figure for figure in row.metrics}
    assert figures['xgdn_errors_total{type="queue_full"}'].server == row.failed
    assert figures['xgdn_finished_total{reason="length"}'].server == row.finished
    assert problems(row, 1.0) == []
    # With as many at once as there are places nobody is refused.
    (row,) = ServingBenchmark(
        Target(crowded, api_key="the key"), load, LoadPlan([math.inf], max_concurrency=4, check=4)
    ).run()
    assert (row.finished, row.failed) == (40, 0)
    assert problems(row, 1.0) == []


def test_a_running_server_is_driven_by_its_address(crowded: str) -> None:
    arguments = [CHECKPOINT, "--url", f"{crowded}/v1", "--rate", "inf", "--requests", 6, "--max-concurrency", 2]
    result = run(*arguments, "--check", 2, *SMALL, "--api-key", "the key")
    assert result.exit_code == 0, result.output
    assert "figures of /metrics agree with the answers" in result.stdout
    assert "between tokens" in result.stdout
    result = run(*arguments, *SMALL, "--api-key", "another")
    assert result.exit_code == 1
    assert "/v1/models names no model" in result.stderr
    result = run(*arguments, *SMALL, "--api-key", "the key", "--model-name", "none")
    assert result.exit_code == 1
    assert "404 model_not_found" in result.stderr


def test_a_disagreement_is_a_sentence_and_exit_code_1(crowded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = ServingRow.of

    def drop_a_token(rate: float, planned: int, answers: Any, equal: Any, metrics: Any) -> ServingRow:
        wrong = [dataclasses.replace(figure, server=figure.server - ("generated" in figure.name)) for figure in metrics]
        return of(rate, planned, answers, equal, wrong)

    monkeypatch.setattr(ServingRow, "of", drop_a_token)
    result = run(
        CHECKPOINT, "--url", crowded, "--rate", "inf", "--requests", 4, "--max-concurrency", 2, *SMALL, "--json",
        "--api-key", "the key",
    )  # fmt: skip
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["rows"]
    assert result.stderr == (
        f"xgdn: rate inf: the server's xgdn_generated_tokens_total grew by {row['tokens_received'] - 1}, "
        f"by the answers it must be {row['tokens_received']}\n"
    )


def test_an_own_server_that_does_not_start_says_why() -> None:
    result = run(CHECKPOINT, "--", "--decode-backend", "none")
    assert result.exit_code == 1
    assert result.stderr.startswith("xgdn: `xgdn serve` ended with status 1: xgdn: ")
    assert "none" in result.stderr
    assert result.stderr.count("\n") == 1


# Of a server what matters to the process that runs it: where it is, and that it stays until it is ended.
STAND_IN = """
import sys, time
assert sys.argv[1] == "serve"
if "--help" in sys.argv:
    sys.exit()
print("a line before")
print('{"address": "http://127.0.0.1:1"}', flush=True)
time.sleep(600)
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_PROGRAM", STAND_IN)


@pytest.mark.usefixtures("stand_in")
def test_an_own_server_may_be_asked_for_help() -> None:
    with running_server(CHECKPOINT, FLOAT32, None) as address:
        assert address == "http://127.0.0.1:1"
    with pytest.raises(ServerError, match="ended with status 0"), running_server(CHECKPOINT, ["--help"], None):
        pass


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("error", [None, ServerError("it does not answer")])
def test_an_own_server_that_dies_is_named_as_the_reason(error: ServerError | None) -> None:
    def use_server_that_dies() -> None:
        before = children(os.getpid())
        with running_server(CHECKPOINT, FLOAT32, None):
            (server,) = set(children(os.getpid())) - set(before)
            os.kill(server, signal.SIGKILL)
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
            if error is not None:
                raise error

    with pytest.raises(ServerError, match="ended with status -9"):
        use_server_that_dies()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_own_server_too(number: signal.Signals, tmp_path: Path) -> None:
    program = "import sys; from xgdn.cli import app; app(sys.argv[1:])"
    arguments = ["bench", "serving", str(CHECKPOINT), "--rate", "0.001", "--check", "1", "--", *FLOAT32]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells hide it from background jobs
        )
        try:
            (server,) = wait_for(lambda: children(process.pid))
            wait_for(lambda: Path(f"/proc/{server}/cmdline").read_bytes().count(b"serve"))
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
            process.wait()
    wait_for(lambda: has_ended(server))


def has_ended(process: int) -> bool:
    """Whether it is gone, or waits for process 1 to take note."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "0"], "requests per second like"),
        (["--rate", "1,nan"], "requests per second like"),
        (["--rate", "fast"], "requests per second like"),
        (["--prompt-tokens", "9-3"], "counts like 32-512"),
        (["--output-tokens", "0-3"], "counts like 32-512"),
        (["--url", "http://127.0.0.1:1", "--", "--dtype", "float32"], "takes no options"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(options: list[str], words: str) -> None:
    result = run(CHECKPOINT, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(CHECKPOINT, "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "http://127.0.0.1:1 does not answer" in result.stderr
    assert result.stderr.count("\n") == 1
    result = run(CHECKPOINT, "--url", "http://a:b")
    assert result.exit_code == 1
    assert "expected an address like" in result.stderr
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    assert vocab_size(CHECKPOINT) == 2048
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 12}}')
    assert vocab_size(tmp_path) == 12

    for module in [name for name in sys.modules if name.startswith("xgdn.bench.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "httpx", None)
    result = run(CHECKPOINT)
    assert result.exit_code == 1
    assert "`xgdn bench serving` needs httpx" in result.stderr
    assert "pip install 'xgdn[bench]'" in result.stderr
    assert result.stderr.count("\n") == 1
