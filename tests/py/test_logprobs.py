# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of generated tokens against the log softmax of the prompt's logits."""

from __future__ import annotations

import pytest
import torch

import xgdn
from checkpoints import CHECKPOINTS, make
from xgdn import errors

PROMPTS = [[5, 17, 3], list(range(70)), [9] * 130]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> xgdn.Engine:
    return xgdn.Engine(
        make(CHECKPOINTS[0], tmp_path_factory.mktemp("logprobs"))[0],
        runner=xgdn.RunnerOptions(max_batch_size=2, max_cached_tokens=1024, max_tokens_per_step=64),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_are_the_log_softmax_before_temperature(engine: xgdn.Engine, count: int, temperature: float) -> None:
    sampling = xgdn.SamplingParams(temperature=temperature, top_k=5, seed=3, logprobs=count)
    for prompt, result in zip(
        PROMPTS, engine.generate(PROMPTS, max_new_tokens=6, sampling=sampling, ignore_eos=True), strict=True
    ):
        assert len(result.logprobs) == len(result.tokens) == 6
        logits = engine.prompt_logits(prompt + result.tokens)[len(prompt) - 1 : -1]
        want = torch.log_softmax(logits.double(), -1)
        for row, token, got in zip(want, result.tokens, result.logprobs, strict=True):
            assert got.chosen == pytest.approx(row[token].item(), abs=1e-4)
            assert [t.logprob for t in got.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-4)
            assert [row[t.token].item() for t in got.top] == pytest.approx([t.logprob for t in got.top], abs=1e-4)
            if count and temperature == 0.0:
                assert (got.top[0].token, got.top[0].logprob) == (token, got.chosen)


def test_the_likeliest_tokens_are_named(engine: xgdn.Engine) -> None:
    """The head multiplies one row here and all rows of the prompt there, so the last bits of fp32 may differ."""
    prompt = PROMPTS[0]
    sampling = xgdn.SamplingParams(logprobs=20)
    (event,) = engine.stream([xgdn.Request(prompt, max_new_tokens=1, sampling=sampling)])
    want = torch.log_softmax(engine.prompt_logits(prompt)[-1].double(), -1)
    ((token,), (logprobs,)) = (event.tokens, event.logprobs)
    assert logprobs.chosen == pytest.approx(want[token].item(), abs=2e-6)
    assert [t.token for t in logprobs.top] == want.topk(20).indices.tolist()


def test_logprobs_come_when_asked_for_and_change_no_token(engine: xgdn.Engine) -> None:
    plain = engine.generate(PROMPTS, max_new_tokens=6, ignore_eos=True)
    asked = engine.generate(PROMPTS, max_new_tokens=6, sampling=xgdn.SamplingParams(logprobs=3), ignore_eos=True)
    assert [r.tokens for r in asked] == [r.tokens for r in plain]
    assert all(r.logprobs == [] for r in plain)
    events = list(engine.stream([xgdn.Request(PROMPTS[2], max_new_tokens=2, sampling=xgdn.SamplingParams(logprobs=3))]))
    assert [len(e.logprobs) for e in events] == [len(e.tokens) for e in events] == [0, 0, 1, 1]


@pytest.mark.parametrize("count", [-1, 21])
def test_counts_out_of_range_are_refused(engine: xgdn.Engine, count: int) -> None:
    with pytest.raises(errors.RequestError, match=rf"logprobs: expected a count 0\.\.20, got {count}"):
        engine.submit(xgdn.Request([1], sampling=xgdn.SamplingParams(logprobs=count)))
