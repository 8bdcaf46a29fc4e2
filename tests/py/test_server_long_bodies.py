# SPDX-License-Identifier: Apache-2.0
"""Long texts and long lists in a request: others are served meanwhile, and what cannot fit is refused early."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Encoding, Tokenizer, models, normalizers, pre_tokenizers

from live_server import (
    CHAT,
    CHECKPOINT,
    GOOD,
    TOKENIZER,
    TOKENS,
    engine,
    http_get,
    live,
    post,
    with_template,
)
from tiny_tokenizers import byte_tokenizer
from xgdn.server import preparation
from xgdn.server.answer import Answer
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.prompt_encoder import PromptEncoder, TooManyTokens
from xgdn.server.schemas import ChatBody, CompletionBody
from xgdn.server.workers import Workers


@pytest.mark.parametrize(
    ("owner", "name"),
    [(preparation, "parse"), (ChatTemplate, "render"), (PromptEncoder, "encode"), (Answer, "document")],
)
def test_others_are_served_while_a_body_is_worked_on(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work: Callable[..., Any] = getattr(owner, name)
    has_begun, may_end = threading.Event(), threading.Event()

    def wait(*args: Any, **options: Any) -> Any:
        has_begun.set()
        assert may_end.wait(30)
        return work(*args, **options)

    monkeypatch.setattr(owner, name, wait)
    folder = with_template(tmp_path)
    with live(engine(folder), folder) as url, ThreadPoolExecutor(1) as clients:
        answer = clients.submit(post, url, CHAT | {"max_tokens": 1}, "/v1/chat/completions")
        try:
            assert has_begun.wait(30)
            assert http_get(f"{url}/health", timeout=20).status_code == 200
            assert not answer.done()
        finally:
            may_end.set()
        assert answer.result().status_code == 200


def test_what_is_short_does_not_wait_for_what_is_long() -> None:
    async def run() -> None:
        workers, may_end = Workers(), threading.Event()
        long = [asyncio.create_task(workers.run(10**6, may_end.wait)) for _ in range(20)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(workers.run(100, lambda: 1), 20) == 1
        may_end.set()
        assert all(await asyncio.gather(*long))
        workers.stop()

    asyncio.run(run())


class Spy:
    """A tokenizer that counts the characters it is given, and has no call that holds Python's lock."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_characters = 0

    def to_str(self) -> str:
        return str(self._tokenizer.to_str())

    def encode_batch(self, texts: Sequence[str], **options: bool) -> list[Encoding]:
        self.num_characters += sum(map(len, texts))
        return list(self._tokenizer.encode_batch(texts, **options))

    def encode_batch_fast(self, texts: Sequence[str], **options: bool) -> list[Encoding]:
        self.num_characters += sum(map(len, texts))
        return list(self._tokenizer.encode_batch_fast(texts, **options))


def words_tokenizer() -> Tokenizer:
    """A token per word, so that a token has no limit of bytes."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("text", ["def f(x): return x\n", "x", "日本語 ", " ", "<|endoftext|>"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_tokenizer()], ids=["trained", "bytes"])
def test_a_text_that_cannot_fit_is_refused_after_a_part_of_it(tokenizer: Tokenizer, text: str) -> None:
    spy: Any = Spy(tokenizer)
    encoder = PromptEncoder(spy)
    for repeats, limit in ((400_000, 100), (400_000, 1000)):
        with pytest.raises(TooManyTokens) as info:
            encoder.encode(["a", text * repeats], limit, add_special_tokens=True)
        assert info.value.count > limit
        assert spy.num_characters <= 8 * limit
        spy.num_characters = 0
    fitting = text * 20
    ids = tokenizer.encode(fitting).ids
    assert encoder.encode([fitting, "a"], len(ids), add_special_tokens=True) == [ids, tokenizer.encode("a").ids]
    with pytest.raises(TooManyTokens):
        encoder.encode([fitting], len(ids) - 1, add_special_tokens=True)


def removing() -> Tokenizer:
    tokenizer = byte_tokenizer()
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True)])
    return tokenizer


def normalizing(normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        TOKENIZER,
        words_tokenizer(),
        removing(),
        stripping(),
        normalizing(normalizers.NFC()),
        normalizing(normalizers.Replace("a", "")),
        normalizing(normalizers.Strip()),
    ],
    ids=["trained", "words", "removing", "stripping", "nfc", "replacing", "strip"],
)
def test_what_fits_is_never_refused(tokenizer: Tokenizer) -> None:
    chance = random.Random(0)
    encoder = PromptEncoder(tokenizer)
    parts = ["a" * 300, "def f(x):", " " * 500, "ΐ" * 90, "é" * 40, "日本", "<|end|>", "\n\n", "x y z ", "?" * 70]
    for _ in range(200):
        text = "".join(chance.choices(parts, k=chance.randint(1, 30)))
        ids = tokenizer.encode(text).ids
        assert encoder.encode([text], len(ids), add_special_tokens=True) == [ids]


def test_the_refusal_names_the_limit(tmp_path: Path) -> None:
    folder = with_template(tmp_path)
    text = "def f(x): return x\n" * 10_000
    with live(engine(folder), folder, max_body_bytes=10**6) as url:
        for body, path, param in (
            (GOOD | {"prompt": text}, "/v1/completions", "prompt"),
            (GOOD | {"prompt": ["a", text]}, "/v1/completions", "prompt"),
            (CHAT | {"messages": [{"role": "user", "content": text}]}, "/v1/chat/completions", "messages"),
        ):
            answer = post(url, body, path)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert f"maximum context length is {TOKENS} tokens, got at least " in error["message"]


MANY = 20_000
TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionBody, GOOD | {"prompt": [{}] * MANY}),
        (CompletionBody, GOOD | {"prompt": [-1] * MANY}),
        (CompletionBody, GOOD | {"prompt": [[-1]] * MANY}),
        (CompletionBody, GOOD | {"stop": [1] * MANY}),
        (CompletionBody, GOOD | {"stop": "a" * MANY}),
        (CompletionBody, GOOD | {"stop_token_ids": ["a"] * MANY}),
        (CompletionBody, GOOD | {"stop_token_ids": [1] * MANY}),
        (CompletionBody, GOOD | {f"field {i}": 1 for i in range(MANY)}),
        (CompletionBody, GOOD | {"stream_options": {f"field {i}": 1 for i in range(MANY)}}),
        (ChatBody, CHAT | {"messages": [{}] * MANY}),
        (ChatBody, CHAT | {"messages": [TURN | {f"field {i}": 1 for i in range(MANY)}]}),
        (ChatBody, CHAT | {"messages": [TURN | {"content": [{}] * MANY}]}),
        (ChatBody, CHAT | {"messages": [TURN | {"content": [{f"field {i}": 1 for i in range(MANY)}]}]}),
    ],
    ids=lambda value: str(value)[:70] if isinstance(value, dict) else "",
)
def test_a_check_ends_with_the_first_mistakes(schema: type[CompletionBody], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as info:
        schema.model_validate(body)
    assert info.value.error_count() <= 4


def test_long_lists_of_what_is_right_are_served(tmp_path: Path) -> None:
    folder = with_template(tmp_path)
    messages = [TURN, TURN | {"content": [{"type": "text", "text": ""}] * MANY}]
    with live(engine(folder), folder, max_body_bytes=10**7) as url:
        assert post(url, CHAT | {"messages": messages, "max_tokens": 1}, "/v1/chat/completions").status_code == 200
        assert post(url, GOOD | {"stop_token_ids": [1] * 4096, "max_tokens": 1}).status_code == 200
        answer = post(url, GOOD | {"prompt": [1] * MANY})
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_an_error_repeats_no_long_text_of_the_client() -> None:
    with live(engine()) as url:
        for body in (GOOD | {"model": "m" * 15_000}, GOOD | {"f" * 15_000: 1}):
            answer = post(url, body)
            assert answer.status_code in (400, 404)
            assert len(answer.content) < 3000


def test_a_tokenizer_s_limits_for_training_do_not_cut_prompts(tmp_path: Path) -> None:
    from xgdn.tokenizer_files import load_tokenizer

    document = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    text = "def f(x): return x\n" * 3
    assert load_tokenizer(tmp_path).encode(text).ids == TOKENIZER.encode(text).ids
