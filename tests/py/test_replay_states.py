# SPDX-License-Identifier: Apache-2.0
"""Engines whose states are checkpoints and rings: the bits of a token are the same by every route to it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import xgdn
from checkpoints import Tiny, greedy, make, qwen3_5, qwen3_5_moe, qwen3_next
from test_layer import (
    HIDDEN,
    LAYERS,
    Host,
    Layer,
    assert_close,
    decode,
    hidden_states,
    prefill,
    truth,
)
from xgdn import _C

# Every product of a depth that the cpu backend multiplies itself.
SHARED = {"shared_expert_intermediate_size": 64}
TINY = [
    Tiny("qwen3_5-dense", qwen3_5, dtype=torch.bfloat16),
    Tiny("qwen3_5-moe", qwen3_5_moe, SHARED, dtype=torch.bfloat16),
    Tiny(
        "qwen3_next-mixed",
        qwen3_next,
        SHARED | {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
        dtype=torch.bfloat16,
    ),
]
NUM_TOKENS = 50
QUANTIZE = [None, "int8", "int4"]


@pytest.fixture(scope="module", params=TINY, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("replay"))[0]


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(128) for _ in range(length)] for length in (1, 15, 16, 37, 90)]


def generated(engine: xgdn.Engine, given: list[list[int]], count: int) -> list[list[tuple[int, float]]]:
    """The tokens of each prompt's answer with their log probabilities."""
    results = engine.generate(given, max_new_tokens=count, ignore_eos=True, sampling=xgdn.SamplingParams(logprobs=1))
    return [[(t, p.chosen) for t, p in zip(r.tokens, r.logprobs, strict=True)] for r in results]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_an_answer_is_the_same_wherever_its_prompt_ends(
    checkpoint: Path, quantize: str | None, state_dtype: torch.dtype
) -> None:
    """One token after the other, or the first of them as the end of the prompt; alone and beside others."""
    runner = xgdn.RunnerOptions(max_batch_size=6, max_cached_tokens=2048, max_tokens_per_step=64)
    engine = xgdn.Engine(checkpoint, replay_states=True, quantize=quantize, state_dtype=state_dtype, runner=runner)
    for prompt in prompts():
        (whole,) = generated(engine, [prompt], NUM_TOKENS)
        ends = [1, 2, 3, *range(5, NUM_TOKENS, 4)]
        given = [prompt + [token for token, _ in whole[:end]] for end in ends]
        for end, rest in zip(ends, generated(engine, given, 6), strict=True):
            want = whole[end : end + 6]
            assert rest[: len(want)] == want


def test_preempted_requests_go_on_with_the_same_bits(checkpoint: Path) -> None:
    want = generated(xgdn.Engine(checkpoint, replay_states=True), prompts(), 40)
    tight = xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=192, kv_block_size=8)
    engine = xgdn.Engine(checkpoint, replay_states=True, runner=tight)
    for _ in range(2):
        before = engine.num_preemptions
        assert generated(engine, prompts(), 40) == want
        assert engine.num_preemptions > before
    assert engine.num_free_slots == 4


def test_branches_have_the_bits_of_single_runs(checkpoint: Path) -> None:
    engine = xgdn.Engine(checkpoint, replay_states=True)
    sampling = xgdn.SamplingParams(temperature=1.0, seed=5, logprobs=1)
    for prompt in prompts():
        branches = engine.generate([prompt], max_new_tokens=30, ignore_eos=True, sampling=sampling, n=3)
        again = engine.generate([prompt], max_new_tokens=30, ignore_eos=True, sampling=sampling, n=3)
        assert [b.tokens for b in branches] == [b.tokens for b in again]
        for branch in branches:  # its tokens as a prompt have the log probabilities that it was drawn with
            logits = engine.prompt_logits(prompt + branch.tokens)[len(prompt) - 1 : -1].log_softmax(1)
            drawn = logits[range(30), branch.tokens]
            assert torch.allclose(drawn, torch.tensor([p.chosen for p in branch.logprobs]), atol=2e-6)


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    directory, reference = make(Tiny("qwen3_5-dense", qwen3_5), tmp_path)
    engine = xgdn.Engine(directory, replay_states=True)
    for prompt in prompts():
        assert engine.generate([prompt], max_new_tokens=24, ignore_eos=True)[0].tokens == greedy(reference, prompt, 24)


def test_the_plan_counts_the_rings(checkpoint: Path) -> None:
    plain, replay = (xgdn.plan(checkpoint, replay_states=replays) for replays in (False, True))
    ring = 4 * (2 * 16 * 16 + 4 * 16 * 16 + 4 * 16 + 1)  # k, u, g and the length of a layer
    assert replay.state_slot_bytes - plain.state_slot_bytes == 3 * ring
    engine = xgdn.Engine(checkpoint, replay_states=True)
    assert engine.memory_bytes["states"] == replay.num_state_slots * replay.state_slot_bytes


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer_pieces_and_decode_are_the_whole(layer: Layer) -> None:
    module = layer.reference()
    (x,) = hidden_states(140)
    net = layer.ours(module, has_replay_states=True)
    whole = Host(net).step([(x, prefill(3))])[0]
    assert_close(whole, truth(module, x))
    host = Host(net)
    got = [host.step([(x[:64], prefill(3))])[0], host.step([(x[64:130], prefill(3, first=False))])[0]]
    got += [host.step([(x[t : t + 1], decode(3))])[0] for t in range(130, 140)]
    assert_close(torch.cat(got), whole)  # bit by bit where the products around the rule are


def test_a_fork_of_a_layers_state_moves_to_its_own_slots() -> None:
    layer = Layer("qwen3_5")
    module = layer.reference()
    (x,) = hidden_states(21)
    other = torch.randn(2, HIDDEN)
    host = Host(layer.ours(module, has_replay_states=True))
    host.step([(x[:20], prefill(0))])
    slots = {"write_slot": 4, "conv_slot": 0, "conv_write_slot": 4}
    forked = [host.step([(other[:1], decode(0, **slots))])[0], host.step([(other[1:], decode(4))])[0]]
    assert_close(torch.cat(forked), truth(module, torch.cat([x[:20], other]))[20:])
    assert_close(host.step([(x[20:], decode(0))])[0], truth(module, x)[20:])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_drafts_are_dropped_by_their_number(layer: Layer) -> None:
    """Whatever is drafted, a token that was accepted has what it has in the whole; before, at and behind a fold."""
    module = layer.reference()
    (x,) = hidden_states(60)
    (junk,) = hidden_states(61)[-1:]
    net = layer.ours(module, has_replay_states=True, max_draft_tokens=5)
    whole = Host(net).step([(x, prefill(0))])[0]
    assert_close(whole, truth(module, x))
    host, draw = Host(net), random.Random(2)
    host.step([(x[:20], prefill(2))])
    position, pending = 20, 0
    while position < 50:
        count, right = draw.randint(1, 6), draw.randint(1, 6)
        right = min(count, right)
        given = torch.cat([x[position : position + right], junk[: count - right]])
        slots = {"write_slot": 2, "num_accepted": max(pending, 1), "num_uncommitted": pending}
        got = host.step([(given, {"kind": _C.SegmentKind.VERIFY, "state_slots": [2], **slots})])[0]
        assert_close(got[:right], whole[position : position + right])
        position, pending = position + right, right
    fork = {"write_slot": 4, "conv_write_slot": 7, "num_accepted": pending, "num_uncommitted": pending}
    got = host.step([(x[position : position + 3], {"kind": _C.SegmentKind.VERIFY, "state_slots": [2], **fork})])[0]
    assert_close(got, whole[position : position + 3])
