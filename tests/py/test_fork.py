# SPDX-License-Identifier: Apache-2.0
"""Several replies to one prompt: each is what a request of its own would have got."""

from __future__ import annotations

from pathlib import Path

import pytest

import xgdn
from checkpoints import CHECKPOINTS, Tiny, make
from xgdn import errors

PROMPTS = [[5, 17, 3], list(range(70)), [9] * 130]


@pytest.fixture(scope="module", params=[CHECKPOINTS[0], CHECKPOINTS[4]], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny: Tiny = request.param
    return make(tiny, tmp_path_factory.mktemp("fork"))[0]


def sampling(seed: int) -> xgdn.SamplingParams:
    return xgdn.SamplingParams(temperature=1.3, top_p=0.95, seed=seed, logprobs=1)


def test_branches_are_requests_of_their_own(checkpoint: Path) -> None:
    engine = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_batch_size=8, max_cached_tokens=2048))
    results = engine.generate(PROMPTS, max_new_tokens=20, sampling=sampling(50), ignore_eos=True, n=3)
    assert [r.branch for r in results] == [0, 1, 2] * 3
    for i, result in enumerate(results):
        alone = engine.generate(
            [PROMPTS[i // 3]], max_new_tokens=20, sampling=sampling(50 + result.branch), ignore_eos=True
        )[0]
        assert result.tokens == alone.tokens
        assert [p.chosen for p in result.logprobs] == pytest.approx([p.chosen for p in alone.logprobs], abs=1e-3)
    assert len({tuple(r.tokens) for r in results}) == 9
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (8, 128)


def test_events_name_the_branch(checkpoint: Path) -> None:
    engine = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_tokens_per_step=64))
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    prefilled = []
    for event in engine.stream(
        [xgdn.Request(PROMPTS[2], max_new_tokens=5, sampling=sampling(1), ignore_eos=True, n=3)]
    ):
        if not event.tokens:
            prefilled.append((event.branch, event.num_prefilled))
        else:
            tokens[event.branch] += event.tokens
    assert prefilled == [(0, 64), (0, 128)], "the prompt is computed once"
    for branch, got in tokens.items():
        alone = engine.generate([PROMPTS[2]], max_new_tokens=5, sampling=sampling(1 + branch), ignore_eos=True)[0]
        assert got == alone.tokens


@pytest.mark.parametrize("num_steps", [0, 1, 3, 5])  # waiting, half of the prompt, forked, later
@pytest.mark.parametrize("branch", [0, 1, 2])
def test_cancel_of_a_branch_leaves_the_others_alone(checkpoint: Path, branch: int, num_steps: int) -> None:
    options = xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=2048, max_tokens_per_step=64)
    engine = xgdn.Engine(checkpoint, runner=options)
    want = engine.generate([PROMPTS[2]], max_new_tokens=8, sampling=sampling(50), ignore_eos=True, n=3)
    request = xgdn.Request(PROMPTS[2], max_new_tokens=8, sampling=sampling(50), ignore_eos=True, n=3)
    request_id = engine.submit(request)
    events = [event for _ in range(num_steps) for event in engine.step()]
    assert engine.cancel(request_id, branch)
    events += engine.step()
    assert [e.branch for e in events if e.finish_reason == xgdn.FinishReason.CANCELLED] == [branch]
    assert not engine.cancel(request_id, branch)
    assert not engine.cancel(request_id, 3)
    assert engine.num_free_slots == 2
    for _ in range(20):
        events += engine.step()
    assert engine.is_idle()
    running = [e for e in events if e.finish_reason == xgdn.FinishReason.RUNNING]
    assert [e.num_prefilled for e in running if not e.tokens] == [64, 128], "the prompt is computed once"
    for other in {0, 1, 2} - {branch}:
        assert [token for e in events if e.branch == other for token in e.tokens] == want[other].tokens
    assert (engine.num_free_slots, engine.num_free_kv_blocks) == (4, 128)


def test_more_branches_than_slots_are_refused(checkpoint: Path) -> None:
    engine = xgdn.Engine(checkpoint, runner=xgdn.RunnerOptions(max_batch_size=2))
    with pytest.raises(errors.RequestError, match=r"n: expected at most 2 branches.*got 3"):
        engine.submit(xgdn.Request([1], n=3))
