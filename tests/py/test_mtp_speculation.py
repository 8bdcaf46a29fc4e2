# SPDX-License-Identifier: Apache-2.0
"""Drafts of the MTP head: no token changes, and those are right that a forward in float64 says are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import xgdn
from checkpoints import Tiny, qwen3_5, qwen3_5_moe, qwen3_next
from live_server import IGNORE_EOS, is_at_rest, live, metrics, post, wait_until
from mtp_checkpoints import Reference, Tensors, WithHead, hidden_of, make_with_head, put_head
from test_replay_states import SHARED
from xgdn import errors

VOCAB = 8  # so few tokens that random drafts are right now and then
FEW = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
TINY = [
    Tiny("dense", qwen3_5, FEW, dtype=torch.bfloat16),
    Tiny("moe", qwen3_5_moe, FEW | SHARED, dtype=torch.bfloat16),
    Tiny("next", qwen3_next, FEW | SHARED, dtype=torch.bfloat16),
]
SIZES = {"max_batch_size": 16, "max_cached_tokens": 4096, "max_tokens_per_step": 64}
COUNT = 40
SOURCES = ("lookup", "mtp")


@pytest.fixture(scope="module", params=TINY, ids=str)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WithHead:
    tiny: Tiny = request.param
    return make_with_head(tiny, tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> WithHead:
    return make_with_head(TINY[0], tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module", params=TINY, ids=str)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WithHead:
    """With three tokens, of whose drafts about one in three is right."""
    tiny: Tiny = request.param
    return make_with_head(replace(tiny, changes=tiny.changes | {"vocab_size": 3}), tmp_path_factory.mktemp("three"))


def engine(made: WithHead, speculate: str, draft_tokens: int = 0, **options: object) -> xgdn.Engine:
    options = {"dtype": torch.bfloat16} | options
    sizes = {name: options.pop(name) for name in list(options) if name in xgdn.RunnerOptions.__dict__}
    return xgdn.Engine(
        made.directory,
        replay_states=True,
        speculate=speculate,
        draft_tokens=draft_tokens,
        runner=xgdn.RunnerOptions(**SIZES | sizes),
        **options,
    )


def prompts(count: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 7, 16, 63, 64, 65, 100, 130, 150, 31, 2, 90, 77, 5, 40, 129)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths[:count]]


def answers(engine: xgdn.Engine, given: list[list[int]], **options: object) -> list[list[tuple[int, float]]]:
    sampling = xgdn.SamplingParams(temperature=options.pop("temperature", 0.0), seed=11, logprobs=0)
    options = {"max_new_tokens": COUNT, "ignore_eos": True} | options
    results = engine.generate(given, sampling=sampling, **options)
    return [[(t, p.chosen) for t, p in zip(r.tokens, r.logprobs, strict=True)] for r in results]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_answers_are_those_without_drafts(made: WithHead, temperature: float, quantize: str | None) -> None:
    """Alone, in a batch of 16, in pieces of prompts, as branches of one prompt, with one draft and with several."""
    plain = engine(made, "off", quantize=quantize)
    given = prompts(16)
    want = answers(plain, given, temperature=temperature)
    branched = answers(plain, given[:4], temperature=temperature, n=4)
    for source, draft_tokens in (("mtp", 1), ("mtp", 4), ("lookup", 3)):
        drafting = engine(made, source, draft_tokens, quantize=quantize)
        assert [answers(drafting, [prompt], temperature=temperature)[0] for prompt in given[:4]] == want[:4]
        assert answers(drafting, given, temperature=temperature) == want
        assert answers(drafting, given[:4], temperature=temperature, n=4) == branched
        stats = drafting.speculation_stats
        assert 0.05 * stats.num_drafted < stats.num_right < stats.num_drafted
        assert drafting.speculation == source
        assert (drafting.num_free_slots, drafting.num_free_kv_blocks) == (16, 256)
    assert (plain.speculation, plain.speculation_stats.num_drafted) == ("off", 0)


@pytest.mark.parametrize("cache_slots", [0, 6])
def test_preemption_cached_prefixes_and_the_load_change_no_token(dense: WithHead, cache_slots: int) -> None:
    """The matrix of the cache, the source of drafts, and the load; turns of conversations; blocks that run out."""
    plain = engine(dense, "off")
    for source in ("off", *SOURCES):
        tight = engine(
            dense, source, max_cached_tokens=400, kv_block_size=8, max_batch_size=8, prefix_cache_slots=cache_slots
        )
        conversations = prompts(8)
        for _ in range(3):
            want = answers(plain, conversations)
            assert answers(tight, conversations) == want
            assert answers(tight, [conversations[2]]) == [want[2]]
            texts = [[token for token, _ in answer] for answer in want]
            conversations = [(c + text + [3])[:150] for c, text in zip(conversations, texts, strict=True)]
        assert tight.num_preemptions > 0
        assert (tight.prefix_cache_stats.num_found > 0) == (cache_slots > 0)
        assert (tight.speculation_stats.num_right > 0) == (source != "off")


def test_stop_tokens_and_limits_inside_drafts(dense: WithHead) -> None:
    drafting, plain = engine(dense, "mtp", 5), engine(dense, "off")
    for prompt in prompts():
        whole = [token for token, _ in answers(plain, [prompt])[0]]
        for stop in set(whole):
            (got,) = drafting.generate([prompt], max_new_tokens=COUNT, stop_token_ids=[stop], ignore_eos=True)
            assert got.tokens == whole[: whole.index(stop) + 1]
            assert got.finish_reason == xgdn.FinishReason.STOP
        for count in range(1, 6):
            (got,) = drafting.generate([prompt], max_new_tokens=count, ignore_eos=True)
            assert got.tokens == whole[:count]
    assert drafting.num_free_slots == 16


def test_a_cancelled_request_leaves_the_others_their_tokens(dense: WithHead) -> None:
    drafting = engine(dense, "mtp", 3)
    want = answers(engine(dense, "off"), prompts(4))
    ids = [drafting.submit(xgdn.Request(p, max_new_tokens=COUNT, ignore_eos=True)) for p in prompts(4)]
    got: dict[int, list[int]] = {request: [] for request in ids}
    while not drafting.is_idle():
        for event in drafting.step():
            got[event.id] += event.tokens
        if len(got[ids[1]]) > 7:
            drafting.cancel(ids[1])
    for request, answer in zip(ids, want, strict=True):
        tokens = [token for token, _ in answer]
        assert got[request] == tokens[: len(got[request])]
        assert (len(got[request]) < COUNT) == (request == ids[1])
    assert drafting.num_free_slots == 16


def simulated(made: WithHead, prompt: list[int], answer: list[int], most: int) -> list[int]:
    """How many tokens each step of a request chooses, by the float64 head."""
    reference = Reference(made, torch.bfloat16)
    tokens = prompt + answer
    hidden = hidden_of(made, tokens)
    chosen = [1]
    while (done := sum(chosen)) < len(answer):
        count = min(most, len(answer) - done - 1)
        known = len(prompt) + done
        drafts = reference.drafts(tokens[:known], hidden[: known - 1], count)
        right = 0
        while right < count and drafts[right] == answer[done + right]:
            right += 1
        chosen.append(1 + right)
    return chosen


def num_drafts(chosen: list[int], most: int) -> int:
    """What steps that choose so many tokens verify: no more than may still come behind the token that is certain."""
    left = [sum(chosen[step:]) for step in range(1, len(chosen))]
    return sum(min(most, tokens - 1) for tokens in left)


def steps_of(engine: xgdn.Engine, given: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """The answers, and how many tokens of them each step has chosen."""
    requests = [xgdn.Request(prompt, max_new_tokens=count, ignore_eos=True) for prompt in given]
    answers, chosen = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for event in engine.stream(requests):
        answers[event.id] += event.tokens
        chosen[event.id] += [len(event.tokens)] if event.tokens else []
    return [answers[i] for i in sorted(answers)], [chosen[i] for i in sorted(chosen)]


@pytest.mark.parametrize("most", [1, 3])
def test_those_drafts_are_right_that_float64_says_are(three: WithHead, most: int) -> None:
    """So the head has seen every token with the hidden state and the successor that it should, by whatever route:
    prompts in pieces, a batch, and preemption."""
    count = 20
    given = [[token % 3 for token in prompt] for prompt in prompts(8)]
    options = {"dtype": torch.float32, "kv_block_size": 32}
    answers, _ = steps_of(engine(three, "off", **options), given, count)
    want = [simulated(three, prompt, answer, most) for prompt, answer in zip(given, answers, strict=True)]
    assert sum(tokens - 1 for chosen in want for tokens in chosen) > 25
    alone = engine(three, "mtp", most, dtype=torch.float32, kv_block_size=256)  # with room for every draft
    for i, prompt in enumerate(given):
        assert steps_of(alone, [prompt], count) == ([answers[i]], [want[i]])
    tight = engine(three, "mtp", most, max_cached_tokens=480, **options)
    assert steps_of(tight, given, count) == (answers, want)
    assert tight.num_preemptions > 0
    assert alone.speculation_stats.num_drafted == sum(num_drafts(chosen, most) for chosen in want)


def test_a_conversation_that_grows_drafts_as_one_that_is_computed_anew(three: WithHead) -> None:
    cached = engine(three, "mtp", prefix_cache_slots=8, dtype=torch.float32)
    tokens = [token % 3 for token in prompts(9)[8]]
    for count in (24, *[1] * 30, 24, 24):  # a token at a time, whose row is the last one of a reply each time
        answers, chosen = steps_of(cached, [tokens], count)
        assert chosen == [simulated(three, tokens, answers[0], 1)]
        tokens = tokens + answers[0]
    assert cached.prefix_cache_stats.num_found > 150


def make_certain(tmp_path: Path) -> WithHead:
    """A model whose next token is a function of the last one alone, and a head that computes it."""
    made = make_with_head(Tiny("certain", qwen3_5, {"vocab_size": 64}, dtype=torch.bfloat16), tmp_path)
    hidden = made.model.config.hidden_size
    adds = ("o_proj.weight", "out_proj.weight", "down_proj.weight")

    def silenced(tensors: Tensors) -> Tensors:
        return {name: torch.zeros_like(t) if name.endswith(adds) else t.clone() for name, t in tensors.items()}

    file = made.directory / "model.safetensors"
    stored = silenced(load_file(file))
    save_file(stored, file)
    head = silenced(made.head)
    head["mtp.fc.weight"] = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    head["mtp.pre_fc_norm_embedding.weight"] = torch.zeros(hidden)
    head["mtp.norm.weight"] = next(t for name, t in stored.items() if name.endswith("model.norm.weight"))
    put_head(made.directory, head)
    return WithHead(made.directory, made.model, head)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_head_that_is_always_right_saves_its_steps(tmp_path: Path, most: int) -> None:
    made = make_certain(tmp_path)
    count = 1 + 12 * (most + 1)
    drafting = engine(made, "mtp", most, kv_block_size=256)
    request = xgdn.Request([5, 6, 7], max_new_tokens=count, ignore_eos=True)
    events = [event for event in drafting.stream([request]) if event.tokens]
    tokens = [token for event in events for token in event.tokens]
    assert [[token for token, _ in a] for a in answers(engine(made, "off"), [[5, 6, 7]], max_new_tokens=count)] == [
        tokens
    ]
    assert len(set(tokens)) > 2
    stats = drafting.speculation_stats
    assert stats.num_right == stats.num_drafted == 12 * most
    assert len(events) == 13


def test_sampled_tokens_have_the_distribution_of_the_model(dense: WithHead) -> None:
    """Chi-square of the first two tokens of many answers, the second of which a draft stands for, against the
    probabilities that the logits give."""
    drafting, prompt, num_samples = engine(dense, "mtp"), prompts()[1], 3000
    requests = [
        xgdn.Request(
            prompt, max_new_tokens=3, ignore_eos=True, sampling=xgdn.SamplingParams(temperature=1.0, seed=seed)
        )
        for seed in range(num_samples)
    ]
    answers = defaultdict[int, list[int]](list)
    for event in drafting.stream(requests):
        answers[event.id] += event.tokens
    first = drafting.prompt_logits(prompt)[-1].double().softmax(-1)
    second = torch.stack([drafting.prompt_logits([*prompt, t])[-1].double().softmax(-1) for t in range(VOCAB)])
    expected = num_samples * (first[:, None] * second).flatten()
    found = torch.zeros(VOCAB * VOCAB, dtype=torch.float64)
    for tokens in answers.values():
        found[tokens[0] * VOCAB + tokens[1]] += 1
    rare = expected < 5  # together one outcome
    expected, found = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (expected, found))
    degrees = len(expected) - 1
    assert degrees > 20
    assert ((found - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5
    stats = drafting.speculation_stats
    assert stats.num_right > 0.1 * num_samples


def test_a_server_counts_drafts_by_their_source(dense: WithHead) -> None:
    body = IGNORE_EOS | {"model": "tiny", "prompt": [5, 6, 7, 0] * 20, "temperature": 0, "max_tokens": 60}
    for source in SOURCES:
        with live(engine(dense, source), dense.directory) as url:
            post(url, body)
            wait_until(lambda: is_at_rest(url))
            now = metrics(url)
        assert 0 < now[f"xgdn_accepted_draft_tokens_total {source}"] <= now[f"xgdn_draft_tokens_total {source}"]


def test_what_cannot_draft_says_so(dense: WithHead) -> None:
    with pytest.raises(errors.UnsupportedError, match="speculate: expected replay_states with drafts"):
        xgdn.Engine(dense.directory, speculate="mtp")
    with pytest.raises(errors.RequestError, match="draft_tokens: expected 0 with speculate=off, got 2"):
        engine(dense, "off", 2)
    with pytest.raises(errors.UnsupportedError, match="speculate: expected off, lookup or mtp, got 'eagle'"):
        engine(dense, "eagle")
    with pytest.raises(errors.UnsupportedError, match="expected off or lookup with tensor_parallel=2, got mtp"):
        xgdn.plan(dense.directory, replay_states=True, speculate="mtp", tensor_parallel=2)
