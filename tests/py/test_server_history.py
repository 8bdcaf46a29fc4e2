# SPDX-License-Identifier: Apache-2.0
"""The history of the engine: against counts and sorted lists of everything that happened, with a clock that is set."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from live_server import (
    GOOD,
    IGNORE_EOS,
    engine,
    http_get,
    is_at_rest,
    live,
    live_stepped,
    metrics,
    post,
    stats,
    tokens_of,
    wait_until,
)
from xgdn.server.history import History, Levels, LogHistogram

WIDTH = 0.011  # relative error of a percentile


def nearest_rank(durations: Sequence[float], percent: int) -> float | None:
    """The shortest duration that at least so many percent of all do not exceed."""
    ordered = sorted(durations)
    for i, duration in enumerate(ordered):
        if 100 * (i + 1) >= percent * len(ordered):
            return duration
    return None


def is_close(got: float | None, want: float | None) -> bool:
    if got is None or want is None:
        return got is want
    return math.isclose(got, want, rel_tol=WIDTH)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 19, 20, 21, 5000])
def test_percentiles_are_those_of_the_sorted_list(count: int) -> None:
    draw = random.Random(count)
    durations = [draw.lognormvariate(-4, 3) for _ in range(count)]
    histogram = LogHistogram()
    for duration in durations:
        histogram.observe(duration)
    for percent in (1, 5, 50, 90, 95, 99, 100):
        got, want = histogram.percentile(percent / 100), nearest_rank(durations, percent)
        assert is_close(got, want), (percent, got, want)


def test_tokens_of_one_step_are_no_time_apart() -> None:
    histogram = LogHistogram()
    for seconds in (0.0, 0.0, 0.0, 0.5):
        histogram.observe(seconds)
    assert histogram.percentile(0.5) == 0
    assert is_close(histogram.percentile(0.95), 0.5)


def test_samples_hold_what_happened_in_them() -> None:
    draw = random.Random(5)
    history = History(1000.0)
    begin, now = 1000.0, 1000.0
    happened: list[tuple[float, str, float]] = []
    while now < 1060:
        history.advance(now)
        for _ in range(draw.choice([0, 1, 40])):
            kind, duration = draw.choice(["first", "between"]), draw.expovariate(20)
            (history.time_to_first_token if kind == "first" else history.inter_token).observe(duration)
            happened.append((now, kind, duration))
        computed, found = draw.randrange(64), draw.randrange(32)
        history.count_prompt_tokens(computed=computed, looked_up=computed + found, found=found)
        happened += [(now, "computed", computed), (now, "found", found)]
        now += draw.choice([0.01, 0.3, 5.0])
    history.advance(1060.0)

    samples = history.since(0)
    assert [sample.time for sample in samples] == [begin + 2 * (i + 1) for i in range(30)]
    for sample in samples:
        by_kind: dict[str, list[float]] = {kind: [] for kind in ("first", "between", "computed", "found")}
        for time, kind, value in happened:
            if sample.time - 2 <= time < sample.time:
                by_kind[kind].append(value)
        num_computed, num_found = sum(by_kind["computed"]), sum(by_kind["found"])
        assert sample.generated_tokens_per_second == (len(by_kind["first"]) + len(by_kind["between"])) / 2
        assert sample.prompt_tokens_per_second == num_computed / 2
        share = num_found / (num_computed + num_found) if num_computed + num_found else None
        assert sample.cached_prefix_share == share
        for name, kind in (("time_to_first_token", "first"), ("inter_token", "between")):
            for percent in (50, 95):
                got, want = getattr(sample, f"{name}_p{percent}"), nearest_rank(by_kind[kind], percent)
                assert is_close(got, want), (sample, name, percent)


def test_levels_are_peaks_and_last_until_they_change() -> None:
    history = History(0.0)
    history.set_levels(Levels(1, 0, 1, 5))
    history.set_levels(Levels(3, 2, 1, 4))
    history.set_levels(Levels(1, 1, 1, 4))
    history.advance(6.5)
    history.set_levels(Levels())
    history.advance(10.0)
    assert [sample.peak for sample in history.since(0)] == [
        Levels(3, 2, 1, 5),
        Levels(1, 1, 1, 4),
        Levels(1, 1, 1, 4),
        Levels(1, 1, 1, 4),
        Levels(),
    ]
    assert [sample.time for sample in history.since(6.0)] == [8.0, 10.0]


def test_memory_is_bounded() -> None:
    def size(tokens_per_second: int, num_seconds: int) -> int:
        draw = random.Random(1)
        history = History(0.0)
        for second in range(num_seconds):
            history.advance(float(second))
            for _ in range(tokens_per_second):
                history.inter_token.observe(draw.lognormvariate(-4, 3))
        return len(pickle.dumps(history))

    assert size(20, 1800) == pytest.approx(size(20, 900), rel=0.02)
    assert size(20_000, 2) < 15_000  # 40,000 numbers would take 360,000 bytes


def test_a_long_silence_costs_no_more_than_the_history() -> None:
    history = History(0.0)
    history.time_to_first_token.observe(1.0)
    history.advance(1e9)
    samples = history.since(0)
    assert [sample.time for sample in samples] == [1e9 - 2 * i for i in reversed(range(300))]
    assert sum(sample.generated_tokens_per_second for sample in samples) == 0


@pytest.fixture
def quick_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgdn.server.metrics.History", partial(History, seconds=0.1))


@pytest.mark.usefixtures("quick_samples")
def test_a_server_counts_every_token_once() -> None:
    prompt = tokens_of("def __init__(self):\n" * 100)[:300]
    num_prompt = len(prompt)
    with live(engine(prefix_cache_slots=2)) as url:
        begin = stats(url)["time"]
        first = post(url, GOOD | IGNORE_EOS | {"prompt": prompt, "n": 2, "max_tokens": 20}).json()["usage"]
        again = post(url, GOOD | IGNORE_EOS | {"prompt": prompt, "max_tokens": 30}).json()["usage"]
        num_cached = again["prompt_tokens_details"]["cached_tokens"]
        assert 0 < num_cached < num_prompt
        assert first["prompt_tokens_details"]["cached_tokens"] == 0
        wait_until(lambda: is_at_rest(url))
        end = stats(url)["time"]
        wait_until(lambda: stats(url, f"/stats/history?since={end}")["samples"] != [])
        history = stats(url, f"/stats/history?since={begin}")
        seconds, samples = history["seconds"], history["samples"]
        assert seconds * sum(it["generated_tokens_per_second"] for it in samples) == pytest.approx(70)
        num_computed = seconds * sum(it["prompt_tokens_per_second"] for it in samples)
        assert num_computed == pytest.approx(2 * num_prompt - num_cached)
        assert max(it["requests_running"] for it in samples) == 2
        assert max(it["slots_used"] for it in samples) >= 2
        assert max(it["kv_blocks_used"] for it in samples) > 0
        now = metrics(url)
        shares = [it["cached_prefix_share"] for it in samples if it["cached_prefix_share"] is not None]
        assert 0 < max(shares) <= 1
        assert now["xgdn_prefix_cache_hits_total"] == num_cached
        longest = max(it["time_to_first_token_p95"] or 0 for it in samples)
        assert 0 < longest <= now["xgdn_time_to_first_token_seconds_sum"] * (1 + WIDTH)


def test_figures_need_the_key(url: str) -> None:
    for path in ("/stats", "/stats/history"):
        answer = http_get(url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert stats(url, path, "wrong")["error"]["code"] == "invalid_api_key"
        assert "error" not in stats(url, path)
    with live(engine(), api_keys=[]) as open_url:
        assert http_get(f"{open_url}/stats").json()["requests"] == []


@pytest.mark.parametrize("since", ["soon", "nan", "inf", ""])
def test_a_time_that_is_none_is_refused(url: str, since: str) -> None:
    error = stats(url, f"/stats/history?since={since}")["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "since")
    assert f"got '{since}'" in error["message"]


def test_requests_under_way_are_described() -> None:
    prompt = tokens_of("def __init__(self):\n" * 12)
    with ThreadPoolExecutor(1) as clients, live_stepped() as (stepped, url):
        answer = clients.submit(post, url, GOOD | IGNORE_EOS | {"prompt": prompt, "n": 2, "max_tokens": 5})
        wait_until(lambda: stats(url)["num_requests"] == 1)
        (waiting,) = stats(url)["requests"]
        assert (waiting["state"], waiting["prompt_tokens"], waiting["choices"]) == ("waiting", len(prompt), 2)
        stepped.allow(1)
        wait_until(lambda: stats(url)["requests"][0]["state"] == "prefill")
        assert stats(url)["requests"][0]["prefilled_tokens"] == 64
        stepped.allow(1 + len(prompt) // 64)
        wait_until(lambda: stats(url)["requests"][0]["generated_tokens"] >= 2)
        (decoding,) = stats(url)["requests"]
        assert (decoding["state"], decoding["prefilled_tokens"]) == ("decoding", len(prompt))
        assert decoding["id"] == waiting["id"]
        assert decoding["seconds"] >= waiting["seconds"] > 0
        stepped.open()
        assert answer.result().status_code == 200
        wait_until(lambda: stats(url)["requests"] == [])
