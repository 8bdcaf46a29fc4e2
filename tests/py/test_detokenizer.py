# SPDX-License-Identifier: Apache-2.0
"""Text that grows token by token: it never splits a character, never waits, and adds up to the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models

from tiny_tokenizers import byte_tokenizer
from xgdn.detokenize import Detokenizer
from xgdn.vocabulary import Vocabulary


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """What each token settles, and the end."""
    detokenizer = Detokenizer(Vocabulary(tokenizer), prompt)
    return [*map(detokenizer.push, tokens), detokenizer.finish()]


@pytest.mark.parametrize("prompt", ["", "before", "é"])
@pytest.mark.parametrize("text", ["plain", "né à Zürich", "日本語 text", "😀👩‍👩‍👧", "\ufffd literal \ufffd", ""])
def test_no_piece_splits_a_character(text: str, prompt: str) -> None:
    got = pieces(byte_tokenizer(), list(text.encode()), list(prompt.encode()))
    assert [piece for piece in got if piece] == list(text)


@pytest.mark.parametrize(
    "data", [b"a\xffb", b"\xe6\x97", b"a\xe6\x97b\xc3\xa9", b"\xff" * 20, b"\x80\x80a\xf0\x9f", b"\xed\xa0\x80\xc0\x80"]
)
def test_bytes_that_are_no_text_add_up_to_the_whole(data: bytes) -> None:
    got = "".join(pieces(byte_tokenizer(), list(data)))
    assert got == byte_tokenizer().decode(list(data)) == data.decode(errors="replace")


def test_any_bytes_add_up_to_the_whole() -> None:
    chance = random.Random(0)
    tokenizer = byte_tokenizer(["<|end|>"])
    likely = [*"aé日😀\ufffd".encode(), 0x80, 0xC0, 0xED, 0xF4, 0xFF, 256]
    for _ in range(300):
        tokens = chance.choices(likely, k=30)
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens), tokens


@pytest.mark.parametrize("data", [b"\x80", b"\xff", "\ufffd".encode(), b"\xc3(", b"\xf0\x9f\x98"])
def test_a_run_of_what_is_no_text_comes_as_it_is_made(data: bytes) -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(Vocabulary(tokenizer), [])
    text = ""
    for count in range(1, 200):
        text += "".join(map(detokenizer.push, data))
        want = tokenizer.decode(list(data) * count)
        assert want.startswith(text)
        assert len(want) - len(text) <= 1  # a character that may go on
    assert text + detokenizer.finish() == want


def test_every_token_is_looked_at_a_fixed_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the text: a run of bytes that are no text takes no more work than another."""
    words = Tokenizer(models.WordLevel({"<0x80>": 0, "a": 1, "\ufffd": 2}))
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for tokenizer, tokens in ((byte_tokenizer(), [0x80]), (words, [0]), (words, [2]), (words, [0, 1])):
        looked_at = 0

        class Spy:
            """The tokenizer, counting the tokens that it is asked for."""

            def __init__(self, tokenizer: Tokenizer) -> None:
                self._tokenizer = tokenizer

            def decode(self, ids: list[int]) -> str:
                nonlocal looked_at
                looked_at += len(ids)
                return str(self._tokenizer.decode(ids))

            def __getattr__(self, name: str) -> object:
                return getattr(self._tokenizer, name)

        spy: object = Spy(tokenizer)
        assert len("".join(pieces(spy, tokens * 1000))) == 1000 * len(tokens)  # type: ignore[arg-type]
        assert looked_at <= 3 * 1000 * len(tokens)


@pytest.mark.parametrize("text", ["é", "日", "😀", "\ufffd"])
def test_a_character_that_begins_in_the_prompt_is_completed(text: str) -> None:
    data = list(text.encode())
    for i in range(1, len(data)):
        for before in ([], [97], [0x80], [0xE6, 0x97], list("日".encode())):
            assert "".join(pieces(byte_tokenizer(), [*data[i:], 98], before + data[:i])) == f"{text}b"
    # Special tokens leave no text, so they are not in between either.
    assert "".join(pieces(byte_tokenizer(["<|end|>"]), [256, *data[1:]], [97, data[0], 256])) == text


def test_a_character_that_begins_in_the_prompt_and_is_not_completed_is_the_prompt_s() -> None:
    tokenizer = byte_tokenizer()
    for prompt in (b"\xe6", b"a\xf0\x9f", b"\xc3"):
        for data in (b"", b"a", b"\xc3\xa9", b"\xffa", b"\x97a" if prompt[0] == 0xE6 else b"\xffb"):
            whole = tokenizer.decode([*prompt, *data])
            want = whole[len(tokenizer.decode(list(prompt))) :]
            assert "".join(pieces(tokenizer, list(data), list(prompt))) == want


def test_the_space_that_a_decoder_drops_at_the_beginning_is_kept() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "s": 2, "▁": 3}))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces(tokenizer, [1, 2, 0], [0]) == [" two", "s", " one", ""]
    assert pieces(tokenizer, [0, 2, 1]) == ["one", "s", " two", ""]


def test_bytes_that_are_decoded_in_runs() -> None:
    words = {"<0xC3>": 0, "<0xA9>": 1, "a": 2, "\ufffd": 3, "▁b": 4, "<0x80>": 5}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert pieces(tokenizer, [0, 1, 0, 1, 2]) == ["", "é", "", "é", "a", ""]
    assert pieces(tokenizer, [5, 5, 0, 1, 3, 3, 4]) == ["\ufffd", "\ufffd", "", "é", "\ufffd", "\ufffd", " b", ""]
    assert pieces(tokenizer, [0, 2, 0]) == ["", "\ufffda", "", "\ufffd"]
    assert pieces(tokenizer, [1, 4], [2, 0]) == ["é", " b", ""]


def test_a_word_like_a_byte_is_text_where_the_decoder_knows_no_bytes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<0xC3>": 0, "a": 1}))
    tokenizer.decoder = decoders.Fuse()
    assert pieces(tokenizer, [0, 1]) == ["<0xC3>", "a", ""]
