# SPDX-License-Identifier: Apache-2.0
"""Drafts that are looked up and verified: every answer has the tokens and the log probabilities that it has without."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import xgdn
from checkpoints import Tiny, make
from live_server import CHECKPOINT, GOOD, IGNORE_EOS, is_at_rest, live, metrics, post, wait_until
from live_server import engine as live_engine
from test_replay_states import TINY
from xgdn import errors

SIZES = {"max_batch_size": 16, "max_cached_tokens": 4096, "max_tokens_per_step": 128}


@pytest.fixture(scope="module", params=[None, TINY[1]], ids=lambda tiny: "trained" if tiny is None else str(tiny))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, whose text repeats itself, or one of random weights, where most drafts are wrong."""
    tiny: Tiny | None = request.param
    return CHECKPOINT if tiny is None else make(tiny, tmp_path_factory.mktemp("drafts"))[0]


def engine(checkpoint: Path, draft_tokens: int, sizes: dict[str, int] = SIZES, **options: object) -> xgdn.Engine:
    runner = xgdn.RunnerOptions(**sizes)
    return xgdn.Engine(
        checkpoint, dtype=torch.bfloat16, replay_states=True, draft_tokens=draft_tokens, runner=runner, **options
    )


def prompts() -> list[list[int]]:
    """Texts that repeat themselves, and one that does not."""
    draw = random.Random(3)
    repeated = [[draw.randrange(128) for _ in range(length)] for length in (3, 7, 20)]
    return [text * (40 // len(text) + 2) for text in repeated] + [[draw.randrange(128) for _ in range(70)]]


def answers(
    engine: xgdn.Engine, given: list[list[int]], count: int = 40, temperature: float = 0.0, **options: object
) -> list[list[tuple[int, float]]]:
    sampling = xgdn.SamplingParams(temperature=temperature, seed=11, logprobs=0)
    results = engine.generate(given, max_new_tokens=count, sampling=sampling, **options)
    return [[(t, p.chosen) for t, p in zip(r.tokens, r.logprobs, strict=True)] for r in results]


@pytest.mark.parametrize(
    ("draft_tokens", "quantize", "temperature"), [(1, None, 0.7), (4, "int8", 0.7), (5, None, 0.7), (15, None, 0.0)]
)
def test_answers_are_those_without_drafts(
    checkpoint: Path, draft_tokens: int, quantize: str | None, temperature: float
) -> None:
    """Greedy and sampled, alone and in a batch; branches of one prompt too."""
    drafting, plain = (engine(checkpoint, n, quantize=quantize) for n in (draft_tokens, 0))
    for given in [*([p] for p in prompts()), prompts() * 4]:
        want = answers(plain, given, temperature=temperature, ignore_eos=True)
        assert answers(drafting, given, temperature=temperature, ignore_eos=True) == want
    branches = {"temperature": temperature, "n": 3, "ignore_eos": True}
    assert answers(drafting, prompts(), **branches) == answers(plain, prompts(), **branches)
    stats = drafting.speculation_stats
    if checkpoint == CHECKPOINT:
        assert 20 < stats.num_right < stats.num_drafted
    assert plain.speculation_stats.num_drafted == 0


def test_penalties_and_bad_words_count_drafts_that_were_right() -> None:
    drafting, plain = engine(CHECKPOINT, 5), engine(CHECKPOINT, 0)
    texts = [it.tokens for it in plain.generate(prompts(), max_new_tokens=40, ignore_eos=True)]
    for rules in (
        {"frequency_penalty": 0.05},
        {"presence_penalty": 0.3, "repetition_penalty": 1.02},
        {"bad_words": [texts[0][20:23], texts[1][15:17]]},
    ):
        sampling = xgdn.SamplingParams(temperature=0.0, **rules)
        options = {"max_new_tokens": 60, "sampling": sampling, "ignore_eos": True}
        want, got = ([it.tokens for it in served.generate(prompts(), **options)] for served in (plain, drafting))
        assert got == want
        assert want != [it.tokens for it in plain.generate(prompts(), max_new_tokens=60, ignore_eos=True)]
    assert drafting.speculation_stats.num_right > 50


def test_an_answer_that_repeats_itself_takes_fewer_steps() -> None:
    drafting = engine(CHECKPOINT, 7)
    request = xgdn.Request(prompts()[0] * 4, max_new_tokens=200, ignore_eos=True)
    events = list(drafting.stream([request]))
    stats = drafting.speculation_stats
    assert sum(len(event.tokens) for event in events) == 200
    assert len([event for event in events if event.tokens]) == 200 - stats.num_right < 160


def test_stop_tokens_end_an_answer_in_the_middle_of_a_verification(checkpoint: Path) -> None:
    drafting, plain = engine(checkpoint, 6), engine(checkpoint, 0)
    for prompt in prompts():
        whole = [token for token, _ in answers(plain, [prompt], ignore_eos=True)[0]]
        for stop in sorted(set(whole))[::3]:
            (got,) = drafting.generate([prompt], max_new_tokens=40, stop_token_ids=[stop], ignore_eos=True)
            assert got.tokens == whole[: whole.index(stop) + 1]
            assert got.finish_reason == xgdn.FinishReason.STOP
        for count in range(1, 6):
            (got,) = drafting.generate([prompt], max_new_tokens=count, ignore_eos=True)
            assert got.tokens == whole[:count]
    assert drafting.num_free_slots == 16


def test_preempted_requests_and_cached_prefixes(checkpoint: Path) -> None:
    tight = {"max_batch_size": 4, "max_cached_tokens": 192, "kv_block_size": 8, "prefix_cache_slots": 4}
    want = answers(engine(checkpoint, 0), prompts(), ignore_eos=True)
    drafting = engine(checkpoint, 5, sizes=tight)
    for _ in range(3):
        assert answers(drafting, prompts(), ignore_eos=True) == want
    assert drafting.num_preemptions > 0
    cached = engine(checkpoint, 5, sizes=SIZES | {"prefix_cache_slots": 8})
    conversation = prompts()[1]
    for turn in range(6):
        want = answers(engine(checkpoint, 0), [conversation], 30, ignore_eos=True)
        assert answers(cached, [conversation], 30, ignore_eos=True) == want
        conversation = conversation + [token for token, _ in want[0]] + [turn, 5]
    assert cached.prefix_cache_stats.num_found > 0
    if checkpoint == CHECKPOINT:
        assert min(drafting.speculation_stats.num_right, cached.speculation_stats.num_right) > 0


def test_what_cannot_draft_says_so(checkpoint: Path) -> None:
    with pytest.raises(errors.UnsupportedError, match="draft_tokens: expected replay_states"):
        xgdn.Engine(checkpoint, draft_tokens=2)
    for count in (-1, 16):
        with pytest.raises(errors.RequestError, match=rf"draft_tokens: expected 0\.\.15, got {count}"):
            engine(checkpoint, count)


def test_the_plan_counts_the_rows_of_drafts(checkpoint: Path) -> None:
    plan = xgdn.plan(checkpoint, replay_states=True, draft_tokens=4)
    without = xgdn.plan(checkpoint, replay_states=True)
    assert plan.state_slot_bytes > without.state_slot_bytes
    assert engine(checkpoint, 4).memory_bytes["states"] == plan.state_slot_bytes * 16


def test_a_server_counts_them() -> None:
    torch.set_num_threads(1)
    body = GOOD | IGNORE_EOS | {"prompt": [5, 6, 7, 8] * 20, "temperature": 0, "max_tokens": 60}
    texts = []
    for options in ({}, {"draft_tokens": 4}):
        with live(live_engine(replay_states=True, **options)) as url:
            texts.append(post(url, body).json()["choices"][0]["text"])
            wait_until(lambda: is_at_rest(url))
            now = metrics(url)
    assert texts[0] == texts[1]
    assert 0 < now["xgdn_accepted_draft_tokens_total lookup"] <= now["xgdn_draft_tokens_total lookup"]
    assert now["xgdn_generated_tokens_total"] == 60
