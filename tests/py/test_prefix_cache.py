# SPDX-License-Identifier: Apache-2.0
"""Cached prefixes: answers have the bits that they have without them, and servers say how much they spared."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import xgdn
from checkpoints import Tiny, make
from live_server import GOOD, IGNORE_EOS, is_at_rest, live, metrics, post, wait_until
from live_server import engine as live_engine
from test_replay_states import TINY

SIZES = {"max_batch_size": 16, "max_cached_tokens": 16384, "max_tokens_per_step": 128}
SLOTS = 24


@pytest.fixture(scope="module", params=TINY, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny: Tiny = request.param
    return make(tiny, tmp_path_factory.mktemp("prefixes"))[0]


def engine(checkpoint: Path, slots: int, **options: object) -> xgdn.Engine:
    return xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(prefix_cache_slots=slots, **SIZES), **options)


def tokens(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(128) for _ in range(count)]


def answers(engine: xgdn.Engine, prompts: list[list[int]], count: int = 24) -> list[list[tuple[int, float]]]:
    """Tokens with their log probabilities."""
    results = engine.generate(prompts, max_new_tokens=count, ignore_eos=True, sampling=xgdn.SamplingParams(logprobs=0))
    return [[(t, p.chosen) for t, p in zip(r.tokens, r.logprobs, strict=True)] for r in results]


@pytest.mark.parametrize("replay_states", [False, True], ids=["plain", "replay"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_conversation_has_the_bits_of_one_without_the_cache(
    checkpoint: Path, quantize: str | None, *, replay_states: bool
) -> None:
    """Twenty turns, alone and beside fifteen others that begin with the same text."""
    options = {"quantize": quantize, "replay_states": replay_states}
    cached, plain = engine(checkpoint, SLOTS, **options), engine(checkpoint, 0, **options)
    prompts = [tokens(1, 90)] + [tokens(1, 90) + tokens(100 + i, 5 + 3 * i) for i in range(15)]
    for turn in range(20):
        want = answers(plain, prompts if turn % 5 == 4 else prompts[:1])
        assert answers(cached, prompts if turn % 5 == 4 else prompts[:1]) == want
        prompts[0] = prompts[0] + [token for token, _ in want[0]] + tokens(turn, 11 + turn % 3)
    stats = cached.prefix_cache_stats
    assert stats.num_found > 0.8 * stats.num_looked_up if replay_states else stats.num_found > 0.6 * stats.num_looked_up
    assert plain.prefix_cache_stats.num_looked_up > stats.num_found
    assert plain.prefix_cache_stats.num_prefixes == 0


def test_random_requests_have_the_bits_of_single_runs(checkpoint: Path) -> None:
    """Prompts that begin with others' prompts and answers, cancelled ones among them, in pools that are too small."""
    draw = random.Random(7)
    runner = xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=640, kv_block_size=8, prefix_cache_slots=6)
    served = xgdn.Engine(checkpoint, replay_states=True, runner=runner)
    alone = xgdn.Engine(checkpoint, replay_states=True)
    known = [tokens(seed, 80) for seed in range(3)]
    for _ in range(12):
        prompts = []
        for _ in range(5):
            text = draw.choice(known)
            prompts.append(
                text[: draw.randint(1, min(len(text), 200))] + tokens(draw.randrange(1000), draw.randint(0, 20))
            )
        dropped = served.submit(xgdn.Request(draw.choice(known)[:150], max_new_tokens=9))
        served.step()
        served.cancel(dropped)
        got = answers(served, prompts, 12)
        assert got == answers(alone, prompts, 12)
        known += [prompt + [token for token, _ in answer] for prompt, answer in zip(prompts, got, strict=True)]
    stats = served.prefix_cache_stats
    assert stats.num_found > 200
    assert stats.num_evictions > 20
    assert served.num_free_slots == 4
    assert served.num_free_kv_blocks == 80


def test_the_plan_counts_its_slots(checkpoint: Path) -> None:
    plan = xgdn.plan(checkpoint, runner=xgdn.RunnerOptions(prefix_cache_slots=SLOTS, **SIZES))
    without = xgdn.plan(checkpoint, runner=xgdn.RunnerOptions(**SIZES))
    assert (plan.num_state_slots, plan.num_prefix_slots) == (16, SLOTS)
    assert plan.total_bytes - without.total_bytes == SLOTS * plan.state_slot_bytes
    assert engine(checkpoint, SLOTS).memory_bytes["states"] == plan.state_bytes == 40 * plan.state_slot_bytes


def test_a_number_of_slots_that_cannot_be_is_refused(checkpoint: Path) -> None:
    with pytest.raises(xgdn.errors.RequestError, match=r"prefix_cache_slots: expected 0\.\..*, got -1"):
        engine(checkpoint, -1)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_server_says_what_was_cached(is_stream: bool) -> None:
    prompt = tokens(3, 400)
    body = GOOD | IGNORE_EOS | {"temperature": 0, "max_tokens": 6, "n": 2, "stream": is_stream}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    with live(live_engine(max_cached_tokens=2048, prefix_cache_slots=8)) as url:
        found = []
        for given in (prompt, [*prompt, 5, 6], [[*prompt, 7], prompt[:300]]):
            answer = post(url, body | {"prompt": given})
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            usage = json.loads(lines[-1])["usage"] if is_stream else answer.json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
        wait_until(lambda: is_at_rest(url))
        now = metrics(url)
    assert found == [0, 384, 384]
    assert now["xgdn_prefix_cache_queries_total"] == 400 + 402 + 401 + 300
    assert now["xgdn_prefix_cache_hits_total"] == 2 * 384
    assert now["xgdn_prefix_cache_prefixes"] > 0
    assert now["xgdn_prefix_cache_bytes"] > 0
    assert now["xgdn_kv_blocks_used"] == now["xgdn_slots_used"] == 0, "cached prefixes go where room is wanted"
