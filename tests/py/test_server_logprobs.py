# SPDX-License-Identifier: Apache-2.0
"""`logprobs` of `xgdn serve`, read by OpenAI's own client, against the engine's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer, decoders, models

import xgdn
from live_server import (
    IGNORE_EOS,
    KEY,
    PROMPT,
    TOKENIZER,
    continuation,
    http_post,
    single,
    tokens_of,
)
from tiny_tokenizers import byte_tokenizer
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import Delta, TextSequence
from xgdn.vocabulary import Vocabulary

CHAT_PROMPT = "# user: é 日本\n# assistant:"
HOT = {"temperature": 2.0, "seed": 22}  # so hot that tokens of some bytes of a character are drawn


def complete(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "n": 3, "extra_body": IGNORE_EOS} | HOT | options
    return client.completions.create(**options)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    messages = [{"role": "user", "content": "é 日本"}]
    options = (
        {"model": "tiny", "messages": messages, "max_tokens": 60, "n": 3, "extra_body": IGNORE_EOS} | HOT | options
    )
    return client.chat.completions.create(logprobs=True, **options)


def engine_results(prompt: str, count: int, n: int = 3) -> list[xgdn.GenerationResult]:
    sampling = xgdn.SamplingParams(**HOT, logprobs=count)
    return single().generate([tokens_of(prompt)], max_new_tokens=60, sampling=sampling, ignore_eos=True, n=n)


def is_character(token: int) -> bool:
    return "\ufffd" not in TOKENIZER.decode([token], skip_special_tokens=False)


def check_name(name: str, token: int) -> None:
    if is_character(token):
        assert name == TOKENIZER.decode([token], skip_special_tokens=False)
    else:
        assert name.startswith("bytes:\\x")


GO_ON = [TOKENIZER.token_to_id(letter) for letter in "Ģ¿"]  # bytes 0x80 and 0xbf, which begin no character


def begins(prompt: list[int], tokens: list[int]) -> list[int]:
    """The characters at which tokens begin, by decoding what comes before each."""

    def num_settled(before: list[int]) -> int:
        length = len(continuation(prompt, before))
        is_inside = before and any(len(continuation(prompt, [*before, byte])) == length for byte in GO_ON)
        return length - bool(is_inside)

    return [num_settled(tokens[:i]) for i in range(len(tokens))]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_completions_tell_the_engine_s_logprobs(client: openai.OpenAI, count: int) -> None:
    answer = complete(client, logprobs=count)
    results = engine_results(PROMPT, count)
    assert answer.usage.completion_tokens == 3 * 60
    for choice, result in zip(answer.choices, results, strict=True):
        got = choice.logprobs
        assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == len(got.text_offset) == 60
        assert got.token_logprobs == pytest.approx([it.chosen for it in result.logprobs], abs=1e-4)
        assert got.text_offset == begins(tokens_of(PROMPT), result.tokens)
        for name, token, top, want in zip(got.tokens, result.tokens, got.top_logprobs, result.logprobs, strict=True):
            check_name(name, token)
            assert top[name] == pytest.approx(want.chosen, abs=1e-4)
            assert list(top.values())[:count] == pytest.approx([it.logprob for it in want.top], abs=1e-4)
            assert len(top) == count + (token not in [it.token for it in want.top])
    # Characters of several tokens are among them.
    assert any(not is_character(token) for result in results for token in result.tokens)


@pytest.mark.parametrize("count", [None, 0, 20])
def test_chats_tell_the_engine_s_logprobs_and_each_token_s_bytes(client: openai.OpenAI, count: int | None) -> None:
    answer = chat(client, **({} if count is None else {"top_logprobs": count}))
    for choice, result in zip(answer.choices, engine_results(CHAT_PROMPT, count or 0), strict=True):
        content = choice.logprobs.content
        assert [it.logprob for it in content] == pytest.approx([it.chosen for it in result.logprobs], abs=1e-4)
        for entry, token, want in zip(content, result.tokens, result.logprobs, strict=True):
            check_name(entry.token, token)
            assert len(entry.top_logprobs) == (count or 0)
            assert [it.logprob for it in entry.top_logprobs] == pytest.approx([it.logprob for it in want.top], abs=1e-4)
            for rival, its in zip(entry.top_logprobs, want.top, strict=True):
                check_name(rival.token, its.token)
        data = b"".join(bytes(entry.bytes or []) for entry in content)
        assert data.decode(errors="replace") == choice.message.content


def test_a_stream_brings_each_token_with_its_text(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=2)
    text = [""] * 3
    told: list[list[tuple[str, float, dict[str, float], int]]] = [[], [], []]
    for chunk in complete(client, logprobs=2, stream=True):
        (choice,) = chunk.choices
        text[choice.index] += choice.text
        got = choice.logprobs
        told[choice.index] += zip(got.tokens, got.token_logprobs, got.top_logprobs, got.text_offset, strict=True)
        offsets = answer.choices[choice.index].logprobs.text_offset
        if choice.finish_reason is None:
            assert len(told[choice.index]) == sum(offset < len(text[choice.index]) for offset in offsets)
    for choice in answer.choices:
        want = choice.logprobs
        rows = told[choice.index]
        assert [row[0] for row in rows] == want.tokens
        assert [row[1] for row in rows] == pytest.approx(want.token_logprobs, abs=1e-4)
        assert [list(row[2]) for row in rows] == [list(top) for top in want.top_logprobs]
        assert [row[3] for row in rows] == want.text_offset

    chunks = [chunk.choices[0] for chunk in chat(client, n=1, stream=True, top_logprobs=2)]
    streamed = [entry for chunk in chunks for entry in chunk.logprobs.content]
    whole = chat(client, n=1, top_logprobs=2).choices[0].logprobs.content
    assert [(e.token, e.bytes, [t.token for t in e.top_logprobs]) for e in streamed] == [
        (e.token, e.bytes, [t.token for t in e.top_logprobs]) for e in whole
    ]


@pytest.mark.parametrize(("begin", "length"), [(1, 1), (9, 4), (20, 9), (31, 2)])
def test_no_token_is_told_behind_a_stop_string(client: openai.OpenAI, begin: int, length: int) -> None:
    whole = complete(client, n=1, temperature=0, logprobs=0).choices[0]
    stop = whole.text[begin : begin + length]
    cut = whole.text.index(stop)
    count = sum(offset < cut for offset in whole.logprobs.text_offset)
    options: dict[str, Any] = {"n": 1, "temperature": 0, "logprobs": 0, "stop": [stop, "never to be seen"]}
    choice = complete(client, **options).choices[0]
    assert choice.text == whole.text[:cut]
    assert choice.logprobs.tokens == whole.logprobs.tokens[:count]
    assert choice.logprobs.text_offset == whole.logprobs.text_offset[:count]
    assert "".join(choice.logprobs.tokens).startswith(choice.text)
    chunks = [chunk.choices[0] for chunk in complete(client, stream=True, **options)]
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == choice.logprobs.tokens


def test_a_stop_token_is_not_told(client: openai.OpenAI) -> None:
    whole = complete(client, n=1, temperature=0, logprobs=0).choices[0].logprobs
    ids = tokens_of(PROMPT)
    (result,) = single().generate([ids], max_new_tokens=4, ignore_eos=True)
    stop = {"extra_body": {"stop_token_ids": [result.tokens[3]]}}
    count = result.tokens.index(result.tokens[3])
    answer = complete(client, n=1, temperature=0, logprobs=0, **stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.tokens == whole.tokens[:count]
    assert answer.usage.completion_tokens == count + 1


def test_nothing_is_told_unasked(client: openai.OpenAI, url: str) -> None:
    assert complete(client).choices[0].logprobs is None
    body = {"model": "tiny", "prompt": "a", "stream": True}
    stream = http_post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60).text
    choices = [json.loads(line[6:])["choices"][0] for line in stream.splitlines() if line.startswith("data: {")]
    assert {choice["logprobs"] for choice in choices} == {None}


NOTHING_ELSE: dict[str, Any] = {"error": "", "num_cached": 0, "prompt_logprobs": [], "hidden": []}  # in an event


def deltas(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str] = (), per_event: int = 1) -> list[Delta]:
    """What a sequence gives for these tokens; the logprob of token i is -i."""
    got: list[Delta] = []
    sequence = TextSequence(0, [], Vocabulary(tokenizer), stops, Metrics(), got.append, [])
    for begin in range(0, len(tokens), per_event):
        part = tokens[begin : begin + per_event]
        is_last = begin + per_event >= len(tokens)
        reason = xgdn.FinishReason.LENGTH if is_last else xgdn.FinishReason.RUNNING
        logprobs = [SimpleNamespace(chosen=-float(begin + i), top=[]) for i in range(len(part))]
        event: Any = SimpleNamespace(tokens=part, logprobs=logprobs, finish_reason=reason, **NOTHING_ELSE)
        sequence.apply(event, 0.0)
    return got


def shown(delta: Delta) -> tuple[str, list[tuple[str, float, int]]]:
    return delta.text, [(it.chosen.token, it.chosen.logprob, it.text_offset) for it in delta.logprobs]


def test_a_token_comes_with_the_first_character_that_it_has_a_part_in() -> None:
    tokenizer = byte_tokenizer(["<|end|>"])
    end = tokenizer.token_to_id("<|end|>")
    tokens = [*tokenizer.encode("aé").ids, end, *tokenizer.encode("b").ids, end]
    got = deltas(tokenizer, tokens)
    assert [shown(delta) for delta in got] == [
        ("a", [("a", 0.0, 0)]),
        ("é", [("bytes:\\xc3", -1.0, 1), ("bytes:\\xa9", -2.0, 1)]),
        ("b", [("<|end|>", -3.0, 2), ("b", -4.0, 2)]),
        ("", [("<|end|>", -5.0, 3)]),
    ]
    assert [it.chosen.bytes for delta in got for it in delta.logprobs] == [[97], [0xC3], [0xA9], None, [98], None]
    # Half a character at the end, and a stop string that is a part of one's tokens.
    assert shown(deltas(tokenizer, tokenizer.encode("aé").ids[:2])[-1]) == ("\ufffd", [("bytes:\\xc3", -1.0, 1)])
    assert [shown(delta) for delta in deltas(tokenizer, tokenizer.encode("aéb日").ids, stops=["é"])] == [
        ("a", [("a", 0.0, 0)]),
        ("", []),
    ]


def test_tokens_wait_with_the_text_that_may_become_a_stop_string() -> None:
    tokenizer = byte_tokenizer(["<|end|>"])
    assert [shown(delta) for delta in deltas(tokenizer, tokenizer.encode("xabyab").ids, stops=["abc"])] == [
        ("x", [("x", 0.0, 0)]),
        ("aby", [("a", -1.0, 1), ("b", -2.0, 2), ("y", -3.0, 3)]),
        ("ab", [("a", -4.0, 4), ("b", -5.0, 5)]),
    ]
    assert [shown(delta) for delta in deltas(tokenizer, tokenizer.encode("xabc").ids, stops=["abc"])] == [
        ("x", [("x", 0.0, 0)]),
        ("", []),
    ]


@pytest.mark.parametrize("stops", [[], ["yz"], ["b日"]])
def test_several_tokens_of_one_event_read_like_events_of_their_own(stops: list[str]) -> None:
    tokenizer = byte_tokenizer(["<|end|>"])
    tokens = tokenizer.encode("aéb日yzaé").ids

    def whole(per_event: int) -> tuple[str, list[object], str | None]:
        got = [delta for delta in deltas(tokenizer, tokens, stops, per_event)]
        parts = [shown(delta) for delta in got]
        return "".join(text for text, _ in parts), [it for _, reports in parts for it in reports], got[-1].finish_reason

    want = whole(per_event=1)
    assert want[2] == ("stop" if stops else "length")
    for per_event in (2, 3, len(tokens)):
        assert whole(per_event) == want


def test_bytes_of_every_token_of_other_tokenizers() -> None:
    alphabet = byte_tokenizer(["<|end|>"])
    vocabulary = Vocabulary(alphabet)
    data = "aé 日\n😀\x00".encode()
    assert b"".join(vocabulary.bytes(token) or b"" for token in alphabet.encode(data.decode()).ids) == data
    assert {vocabulary.bytes(token) for token in range(256)} == {bytes([byte]) for byte in range(256)}
    assert (vocabulary.bytes(10_000), vocabulary.name(10_000)) == (None, "<10000>")

    pieces = Tokenizer(models.WordLevel({"▁one": 0, "two": 1, "<0xC3>": 2}))
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    vocabulary = Vocabulary(pieces)
    assert [vocabulary.bytes(token) for token in range(3)] == [b" one", b"two", b"\xc3"]
    assert [vocabulary.name(token) for token in range(3)] == [" one", "two", "bytes:\\xc3"]
