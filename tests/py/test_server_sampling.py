# SPDX-License-Identifier: Apache-2.0
"""The sampling fields of a request: each gives what the engine gives, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

import xgdn
from live_server import GOOD, PROMPT, TOKENIZER, engine, live, openai_client, post, single, tokens_of, want
from xgdn.sampling_defaults import SamplingDefaults

IDS = tokens_of(PROMPT)
PLAIN = single().generate([IDS], max_new_tokens=24, ignore_eos=True)[0].tokens


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(engine()) as address:
        yield address


def text(url: str, **fields: Any) -> str:
    body = GOOD | {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True} | fields
    answer = post(url, body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


FIELDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"presence_penalty": 2}, {"presence_penalty": 2.0}),
    ({"frequency_penalty": 1}, {"frequency_penalty": 1.0}),
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ({"logit_bias": {str(PLAIN[0]): -100, str(PLAIN[2]): -3.5}}, {"logit_bias": {PLAIN[0]: -100.0, PLAIN[2]: -3.5}}),
    ({"temperature": 1.0, "seed": 3, "min_p": 0.2}, {"temperature": 1.0, "seed": 3, "min_p": 0.2}),
    ({"temperature": 1.0, "seed": -1}, {"temperature": 1.0, "seed": 2**64 - 1}),
]


@pytest.mark.parametrize(("fields", "params"), FIELDS, ids=lambda it: "-".join(it))
def test_a_field_is_the_engine_s(url: str, fields: dict[str, Any], params: dict[str, Any]) -> None:
    got = text(url, **fields)
    (result,) = single().generate([IDS], max_new_tokens=24, ignore_eos=True, sampling=xgdn.SamplingParams(**params))
    assert got == TOKENIZER.decode(IDS + result.tokens)[len(TOKENIZER.decode(IDS)) :]
    assert got != TOKENIZER.decode(IDS + PLAIN)[len(TOKENIZER.decode(IDS)) :]


def test_a_seed_gives_the_same_in_a_batch(url: str) -> None:
    everything = {
        "temperature": 0.9,
        "seed": 11,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "min_p": 0.02,
        "logit_bias": {str(PLAIN[1]): 2},
        "bad_words": ["self"],
    }
    alone = text(url, **everything)
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(text, url, temperature=1.0, seed=i, presence_penalty=-0.5) for i in range(5)]
        assert text(url, **everything) == alone
        for other in others:
            other.result()


def test_min_tokens_holds_the_end_back(url: str) -> None:
    stop = PLAIN[1]
    fields: dict[str, Any] = {"stop_token_ids": [stop], "ignore_eos": False}
    usage = [
        post(url, GOOD | {"prompt": PROMPT, "temperature": 0, "max_tokens": 24} | fields | more).json()["usage"]
        for more in ({}, {"min_tokens": 8})
    ]
    assert usage[0]["completion_tokens"] == 2
    assert usage[1]["completion_tokens"] > 8


def test_a_bad_word_does_not_come(url: str) -> None:
    plain = text(url)
    word = next(word for word in plain.split() if len(word) > 2 and len(TOKENIZER.encode(word).ids) == 1)
    assert word in plain
    assert word not in text(url, bad_words=[word]).split()


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"presence_penalty": 2.1}, "invalid_value", "'presence_penalty'"),
        ({"frequency_penalty": "1"}, "invalid_type", "'frequency_penalty'"),
        ({"repetition_penalty": 0}, "invalid_value", "'repetition_penalty'"),
        ({"repetition_penalty": 1e-30}, "invalid_value", "'repetition_penalty'"),
        ({"min_p": 1.01}, "invalid_value", "'min_p'"),
        ({"min_tokens": 25}, "invalid_value", "'min_tokens': expected at most 24"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "expected token ids as keys, got 'x'"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "expected token ids as keys, got '-1'"),
        ({"logit_bias": {"99999": 1}}, "invalid_value", "'logit_bias': expected token ids below 2048, got 99999"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "'logit_bias"),
        ({"bad_words": [""]}, "invalid_value", "'bad_words[0]'"),
        ({"best_of": 2}, "unsupported_parameter", "'best_of' is not supported"),
        ({"suffix": "x"}, "unsupported_parameter", "'suffix' is not supported"),
    ],
    ids=lambda it: "-".join(it) if isinstance(it, dict) else "",
)
def test_a_value_out_of_range_is_refused(url: str, fields: dict[str, Any], code: str, words: str) -> None:
    answer = post(url, GOOD | {"max_tokens": 24} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code)
    assert words in error["message"]
    assert error["param"].split("[")[0].split(".")[0] in fields


def test_the_model_s_defaults_hold_where_a_request_says_nothing() -> None:
    defaults = SamplingDefaults(temperature=0.0, repetition_penalty=1.4, min_p=0.1, max_new_tokens=7)
    with live(engine(), sampling_defaults=defaults) as url:
        params = {"repetition_penalty": 1.4, "min_p": 0.1}
        assert text(url) == want(PROMPT, 24, **params)
        assert text(url, repetition_penalty=1.0, min_p=0) == want(PROMPT, 24)
        card = openai_client(url).models.retrieve("tiny")
        assert card.model_extra is not None
        assert card.model_extra["default_sampling_params"] == replace(defaults, problems=()).values()
        # Completions have a default of their own.
        assert post(url, GOOD | {"ignore_eos": True}).json()["usage"]["completion_tokens"] == 16
