# SPDX-License-Identifier: Apache-2.0
"""Grammars written in Python, in an engine."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import xgdn
from live_server import engine
from xgdn.errors import GenerationError

PROMPT = [5, 6, 7]


class Choice:
    """One of some replies."""

    def __init__(self, *replies: list[int], jumps: bool = True) -> None:
        self.replies = replies
        self.jumps = jumps
        self.stop_tokens: list[int] = []
        self.matchers: list[weakref.ref[ChoiceMatcher]] = []

    def matcher(self) -> ChoiceMatcher:
        matcher = ChoiceMatcher(self)
        self.matchers.append(weakref.ref(matcher))
        return matcher


class ChoiceMatcher:
    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._taken: list[int] = []

    def _rests(self) -> list[list[int]]:
        size = len(self._taken)
        return [reply[size:] for reply in self._choice.replies if reply[:size] == self._taken]

    def write_mask(self, mask: torch.Tensor) -> None:
        bits = torch.zeros(mask.numel() * 32, dtype=torch.int64)
        for rest in self._rests():
            bits[rest[:1] or self._choice.stop_tokens] = 1
        mask.copy_((bits.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32))

    def accept(self, tokens: Sequence[int]) -> None:
        assert isinstance(tokens, list)
        self._taken += tokens
        if not self._rests():
            raise ValueError(f"nobody expected {tokens}")

    def forced(self) -> list[int]:
        rests = self._rests()
        return rests[0] if len(rests) == 1 and self._choice.jumps else []


@pytest.fixture(scope="module")
def served() -> xgdn.Engine:
    return engine()


@pytest.mark.parametrize("jumps", [True, False])
def test_replies_are_what_the_grammar_says(served: xgdn.Engine, jumps: bool) -> None:
    choice = Choice([900, 901, 902, 903], [900, 17, 18], [40], jumps=jumps)
    choice.stop_tokens = served.eos_token_ids[:1]
    sampling = xgdn.SamplingParams(temperature=1000.0, seed=4)
    free = served.generate([PROMPT], max_new_tokens=12)
    results = served.generate([PROMPT, PROMPT[:2]], max_new_tokens=12, sampling=sampling, n=4, grammar=choice)
    assert {result.finish_reason for result in results} == {xgdn.FinishReason.STOP}
    assert all(result.tokens[-1:] == choice.stop_tokens for result in results)
    assert all(result.tokens[:-1] in choice.replies for result in results)
    assert len({tuple(result.tokens) for result in results}) > 1
    assert served.generate([PROMPT], max_new_tokens=12)[0].tokens == free[0].tokens


def test_a_request_keeps_the_object(served: xgdn.Engine) -> None:
    choice = Choice([40])
    assert xgdn.Request(PROMPT, grammar=choice).grammar is choice
    assert xgdn.Request(PROMPT).grammar is None


def test_what_a_matcher_raises_ends_its_request_alone(served: xgdn.Engine) -> None:
    choice = Choice([40, 41])  # without a stop token: nothing may follow
    want = served.generate([PROMPT], max_new_tokens=6)[0].tokens
    requests = [xgdn.Request(PROMPT, grammar=choice, max_new_tokens=6), xgdn.Request(PROMPT, max_new_tokens=6)]
    events = list(served.stream(requests))
    ended = {event.id: event for event in events if event.finish_reason != xgdn.FinishReason.RUNNING}
    first, second = sorted(ended)
    assert "none that the rules of the request allow" in ended[first].error
    assert [token for event in events if event.id == second for token in event.tokens] == want

    class Broken(Choice):
        def matcher(self) -> ChoiceMatcher:
            raise LookupError("no such grammar")

    with pytest.raises(GenerationError, match=r"\[Grammar\] no such grammar"):
        served.generate([PROMPT], grammar=Broken([1]))


def test_matchers_go_with_their_sequences(served: xgdn.Engine) -> None:
    choice = Choice([900, 901, 902], [900, 17])
    choice.stop_tokens = served.eos_token_ids[:1]
    served.generate([PROMPT] * 3, max_new_tokens=6, grammar=choice)
    cancelled = served.submit(xgdn.Request(PROMPT, max_new_tokens=6, grammar=choice))
    served.step()
    served.cancel(cancelled)
    while not served.is_idle():
        served.step()
    assert len(choice.matchers) == 4
    deadline = time.monotonic() + 20
    while any(matcher() is not None for matcher in choice.matchers):
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["step", "loop"])
def test_a_process_may_end_while_masks_are_computed(how: str) -> None:
    """A thread that waits for the interpreter's lock as the interpreter ends would end the process with it."""
    code = f"""
import test_engine_grammar as grammars, xgdn
from live_server import engine

served = engine()
choice = grammars.Choice([900, 901, 902, 903], [900, 17, 18], [40])
choice.stop_tokens = served.eos_token_ids[:1]
requests = [xgdn.Request(grammars.PROMPT, max_new_tokens=12, grammar=choice) for _ in range(30)]
if "{how}" == "step":
    for request in requests:
        served.submit(request)
    served.step()
else:
    loop = served.loop()
    for request in requests:
        loop.submit(request, lambda event: None)
"""
    folder = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([folder, *sys.path])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_rules_hold_in_a_reply(served: xgdn.Engine) -> None:
    plain = served.generate([PROMPT], max_new_tokens=8, ignore_eos=True)[0].tokens
    first = xgdn.SamplingParams(logit_bias={plain[0]: -100.0})
    assert first.logit_bias == {plain[0]: -100.0}
    assert served.generate([PROMPT], max_new_tokens=8, sampling=first)[0].tokens[0] != plain[0]
    word = xgdn.SamplingParams(bad_words=[plain[2:4]])
    tokens = served.generate([PROMPT], max_new_tokens=8, sampling=word, ignore_eos=True)[0].tokens
    assert tokens[:3] == plain[:3]
    assert tokens[3] != plain[3]


def test_a_prompt_is_reported(served: xgdn.Engine) -> None:
    request = xgdn.Request([*range(5, 90)], max_new_tokens=0, prompt_logprobs=1, wants_hidden=True)
    events = list(served.stream([request]))
    want = served.prompt_logits(request.prompt).double().log_softmax(-1)
    got = [logprobs.chosen for event in events for logprobs in event.prompt_logprobs]
    assert torch.allclose(
        torch.tensor(got, dtype=torch.double), want[:-1].gather(1, torch.arange(6, 90)[:, None])[:, 0], atol=1e-5
    )
    assert events[-1].finish_reason == xgdn.FinishReason.LENGTH
    assert not any(event.hidden for event in events[:-1])
    assert len(events[-1].hidden) > 0
