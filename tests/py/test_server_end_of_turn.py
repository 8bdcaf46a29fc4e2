# SPDX-License-Identifier: Apache-2.0
"""What ends an answer: the tokens of the model's and of its tokenizer's files, stop strings with special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from typer.testing import CliRunner

import xgdn
from live_server import CHECKPOINT, GOOD, PROMPT, TEMPLATE, TOKENIZER, continuation, engine, live, post, single
from tiny_tokenizers import byte_tokenizer
from xgdn.cli import app as cli_app
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import Delta, TextSequence
from xgdn.server.stop_strings import StopStrings
from xgdn.vocabulary import Vocabulary

IDS: list[int] = TOKENIZER.encode(PROMPT).ids
LENGTH = 24


def said() -> list[int]:
    """The tokens of the small model's greedy answer to PROMPT."""
    (result,) = single().generate([IDS], max_new_tokens=LENGTH, ignore_eos=True)
    tokens: list[int] = result.tokens
    return tokens


def new_tokens(tokens: Sequence[int]) -> list[int]:
    """The places at which a token is said that was not said before."""
    return [i for i, token in enumerate(tokens) if token not in tokens[:i]]


def model_dir(folder: Path, special: Sequence[int] = (), **files: Any) -> Path:
    """The checkpoint in an empty folder, with other files, and with tokens of its vocabulary made special."""
    for file in CHECKPOINT.iterdir():
        if file.name.removesuffix(".json") not in files and file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    names = [TOKENIZER.id_to_token(token) for token in special]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def streamed(url: str, body: dict[str, Any]) -> tuple[str, str]:
    """Text and finish_reason of a completion's chunks."""
    lines = post(url, body | {"stream": True}).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.parametrize("form", ["name", "object", "list", "old"])
def test_the_tokenizer_s_end_of_turn_ends_an_answer(form: str, tmp_path: Path) -> None:
    tokens = said()
    place = new_tokens(tokens)[6]
    name = TOKENIZER.id_to_token(tokens[place])
    entry = {"name": name, "object": {"content": name, "special": True}, "list": ["unknown", name], "old": name}[form]
    config: dict[str, Any] = {"added_tokens_decoder": {}, "eos_token": entry}
    files = {"tokenizer_config": None, "special_tokens_map": config} if form == "old" else {"tokenizer_config": config}
    if form == "old":
        del config["added_tokens_decoder"]
    folder = model_dir(tmp_path, **files)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    body = GOOD | {"prompt": IDS, "max_tokens": LENGTH, "temperature": 0}
    text = continuation(IDS, tokens[:place])
    with live(engine(folder), folder) as url:
        answer = post(url, body).json()
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (text, "stop")
        assert answer["usage"]["completion_tokens"] == place + 1
        assert streamed(url, body) == (text, "stop")
        answer = post(url, body | {"ignore_eos": True}).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (LENGTH, "length")

    for options, count in (([], place + 1), (["--ignore-eos"], LENGTH)):
        ids = ",".join(map(str, IDS))
        command = ["generate", str(folder), "--prompt-ids", ids, "--max-new-tokens", str(LENGTH), *options]
        assert CliRunner().invoke(cli_app, command).stdout.split() == [str(token) for token in tokens[:count]]


def test_a_chat_s_answer_ends_with_the_tokenizer_s_end_of_turn(tmp_path: Path) -> None:
    ids = TOKENIZER.encode("# user: a\n# assistant:").ids
    (result,) = single().generate([ids], max_new_tokens=LENGTH, ignore_eos=True)
    place = new_tokens(result.tokens)[3]
    folder = model_dir(tmp_path, tokenizer_config={"eos_token": TOKENIZER.id_to_token(result.tokens[place])})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": LENGTH}
    with live(engine(folder), folder) as url:
        choice = post(url, body, "/v1/chat/completions").json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == continuation(ids, result.tokens[:place])


def test_the_ends_of_all_files_count(tmp_path: Path) -> None:
    tokens = said()
    places = new_tokens(tokens)[2:5]
    config = json.loads((CHECKPOINT / "config.json").read_text())
    for first in range(3):  # each of the three comes first once
        ends = {name: tokens[place] for name, place in zip("abc"[first:] + "abc"[:first], places, strict=True)}
        folder = tmp_path / str(first)
        folder.mkdir()
        model_dir(
            folder,
            config=config | {"eos_token_id": ends["a"]},
            generation_config={"eos_token_id": [ends["b"]]},
            tokenizer_config={"eos_token": TOKENIZER.id_to_token(ends["c"])},
        )
        ids = ",".join(map(str, IDS))
        result = CliRunner().invoke(cli_app, ["generate", str(folder), "--prompt-ids", ids])
        assert result.stdout.split() == [str(token) for token in tokens[: places[0] + 1]]


def test_a_damaged_tokenizer_config_is_told_at_start(tmp_path: Path) -> None:
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
            live(engine(), tmp_path).__enter__()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Tokenizer, list[int], int]]:
    """A server of a model that says a special token: its address, tokenizer, answer, and the place of the token."""
    tokens = said()
    place = new_tokens(tokens)[6]
    folder = model_dir(tmp_path_factory.mktemp("chatty"), special=[tokens[place]])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with live(engine(folder), folder, tokenizer) as url:
        yield url, tokenizer, tokens, place


def test_a_stop_string_may_be_a_special_token_or_have_one_in_it(
    chatty: tuple[str, Tokenizer, list[int], int],
) -> None:
    url, tokenizer, tokens, place = chatty
    name = tokenizer.id_to_token(tokens[place])

    def text(end: int) -> str:
        return str(tokenizer.decode(IDS + tokens[:end]))[len(tokenizer.decode(IDS)) :]

    before, whole, after = text(place), text(LENGTH), text(place + 2)[len(text(place)) :]
    assert name not in whole
    body = GOOD | {"prompt": IDS, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    for stop, want, count in (
        (name, before, place + 1),
        (name + after, before, place + 2),
        (before[-3:] + name, before[:-3], place + 1),
        (before[-1] + name + after[0], before[:-1], place + 2),
        (name + "never to be seen", whole, LENGTH),
        (name[1:], whole, LENGTH),  # a part of a name is not the token
    ):
        answer = post(url, body | {"stop": [stop, "\0never"]}).json()
        choice = answer["choices"][0]
        reason = "length" if count == LENGTH else "stop"
        assert (choice["text"], choice["finish_reason"]) == (want, reason), stop
        assert answer["usage"]["completion_tokens"] == count
        assert streamed(url, body | {"stop": stop}) == (want, reason)


def test_a_stop_string_may_end_with_the_token_that_ends_the_answer(tmp_path: Path) -> None:
    tokens = said()
    place = new_tokens(tokens)[6]
    name = TOKENIZER.id_to_token(tokens[place])
    folder = model_dir(tmp_path, special=[tokens[place]], tokenizer_config={"eos_token": name})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    before = str(tokenizer.decode(IDS + tokens[:place]))[len(tokenizer.decode(IDS)) :]
    body = GOOD | {"prompt": IDS, "max_tokens": LENGTH, "temperature": 0, "stop": before[-2:] + name}
    with live(engine(folder), folder, tokenizer) as url:
        choice = post(url, body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (before[:-2], "stop")
        assert streamed(url, body) == (before[:-2], "stop")


def deltas(tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, str | None, int]:
    """Text, finish_reason and number of tokens of what a sequence of bytes and special tokens gives."""
    got: list[Delta] = []
    vocabulary = Vocabulary(byte_tokenizer(["<|end|>", "<|start|>"]))
    sequence = TextSequence(0, [], vocabulary, stops, Metrics(), got.append, [])
    for i, token in enumerate(tokens):
        reason = xgdn.FinishReason.LENGTH if i == len(tokens) - 1 else xgdn.FinishReason.RUNNING
        event: Any = SimpleNamespace(
            tokens=[token],
            logprobs=[],
            finish_reason=reason,
            error="",
            num_cached=0,
            prompt_logprobs=[],
            hidden=[],
        )
        sequence.apply(event, 0.0)
    return "".join(delta.text for delta in got), got[-1].finish_reason, sequence.num_tokens


def test_special_tokens_in_stop_strings_meet_text_in_any_order() -> None:
    end, start = 256, 257
    tokens = [*b"ab", end, start, *b"user\n", end, *b"x"]
    assert deltas(tokens, ["<|end|>"]) == ("ab", "stop", 3)
    assert deltas(tokens, ["<|end|><|start|>"]) == ("ab", "stop", 4)
    assert deltas(tokens, ["<|start|>user"]) == ("ab", "stop", 8)
    assert deltas(tokens, ["b<|end|>\n", "<|start|>us"]) == ("ab", "stop", 6)
    assert deltas(tokens, ["\n<|end|>x"]) == ("abuser", "stop", 11)
    assert deltas(tokens, ["<|end|>user"]) == ("ab", "stop", 8)  # of the other token nothing was asked
    assert deltas(tokens, ["abu"]) == ("", "stop", 5)  # nor of any here
    assert deltas(tokens, ["<|end|>y", "<|en", "end"]) == ("abuser\nx", "length", 11)
    assert deltas([*b"a<|end|>b"], ["<|end|>"]) == ("a", "stop", 8)  # spelt out by the model
    # Bytes of an unfinished character before the token are text, and what comes behind completes no character then.
    assert deltas([97, 0xE6, end, 0x97], ["<|end|>"]) == ("a\ufffd", "stop", 3)
    assert deltas([97, 0xE6, end, 0x97, 0xA5], ["<|end|>b"]) == ("a\ufffd\ufffd\ufffd", "length", 5)
    assert deltas([97, 0xE6, end, 0x97, 0xA5], ["<|start|>"]) == ("a日", "length", 5)
    # A run that is no text has an end, too.
    assert deltas([0x80] * 50 + [*b"stop"], ["st"]) == ("\ufffd" * 50, "stop", 52)
    assert deltas([0x80] * 50, ["\ufffd" * 7]) == ("", "stop", 7)


def test_a_long_stop_string_costs_no_more_than_the_text() -> None:
    strings = StopStrings(["a" * 1_000_000 + "b"], re.compile(re.escape("<|end|>")))
    given = "".join(strings.push("a") for _ in range(1000)) + strings.push("c")
    assert (given, strings.finish()) == ("a" * 1000 + "c", "")
    (matcher,) = strings._matchers
    assert len(matcher._borders) <= 1001
