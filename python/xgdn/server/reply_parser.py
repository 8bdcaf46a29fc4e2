# SPDX-License-Identifier: Apache-2.0
"""The parts of a reply: thought, answer and calls of tools, taken apart while it is written."""

import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from xgdn.server.text_reader import TextReader
from xgdn.server.tool_call_formats import CallStart, ToolCallFormat

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next part of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Content | Reasoning | ToolCallBegin | ToolCallArguments
_Pieces = Generator[Piece | None, None, None]


@dataclass(frozen=True)
class ReplySyntax:
    """What a reply may consist of, beside the answer itself."""

    has_thought: bool = False
    begins_in_thought: bool = False  # because the prompt has its tag
    tool_calls: ToolCallFormat | None = None
    max_calls: int | None = None


class ReplyParser:
    """Takes one reply apart. The pieces add up to the same message wherever the text is split.

    Whitespace next to a tag goes with the tag.
    """

    def __init__(self, syntax: ReplySyntax) -> None:
        self.end_of_thought: int | None = 0  # in characters of the text; None while it lasts
        self._syntax = syntax
        self._reader = TextReader()
        self._num_calls = 0
        self._has_content = False
        self._blanks = _HeldBlanks()
        self._pieces = self._reply()

    def push(self, text: str) -> list[tuple[Piece, int]]:
        """Return the pieces that are final after `text`, each with the length of the text up to its end."""
        self._reader.push(text)
        return self._next_pieces()

    def finish(self) -> list[tuple[Piece, int]]:
        """Return the rest, once the text is complete."""
        self._reader.finish()
        return self._next_pieces()

    def _next_pieces(self) -> list[tuple[Piece, int]]:
        pieces: list[tuple[Piece, int]] = []
        for piece in self._pieces:
            if piece is None:
                break
            pieces.append((piece, self._reader.offset))
        return pieces

    def _reply(self) -> _Pieces:
        if self._syntax.has_thought:
            yield from self._thought()
        if self._syntax.tool_calls is not None:
            yield from self._calls(self._syntax.tool_calls)
        yield from self._reader.scan(_never, self._content)

    def _thought(self) -> _Pieces:
        if not self._syntax.begins_in_thought:
            self._reader.record()
            yield from self._reader.blanks()
            begin = yield from self._reader.word(THOUGHT)
            text = self._reader.recorded()
            if not begin:
                yield from self._content(text)
                return
        self.end_of_thought = None
        yield from self._reader.blanks()
        if (yield from self._reader.until((END_OF_THOUGHT,), self._reasoning)):
            self.end_of_thought = self._reader.offset
            self._blanks.drop()
            yield from self._reader.blanks()
        elif rest := self._blanks.take():
            yield Reasoning(rest)

    def _calls(self, form: ToolCallFormat) -> _Pieces:
        while self._syntax.max_calls is None or self._num_calls < self._syntax.max_calls:
            marker = yield from self._reader.until(form.markers, self._content)
            if not marker:
                break
            start = yield from form.read_start(self._reader, marker)
            text = start if isinstance(start, str) else (yield from self._call(form, start))
            yield from self._content(text)
        yield from self._reader.scan(_never, self._content)
        if (rest := self._blanks.take()) and self._num_calls == 0:
            yield Content(rest)

    def _call(self, form: ToolCallFormat, start: CallStart) -> Generator[Piece | None, None, str]:
        """Give a call; return text that was read behind it."""
        index = self._num_calls
        self._num_calls += 1
        self._blanks.drop()
        yield ToolCallBegin(index, f"call_{secrets.token_hex(12)}", start.name)
        if start.arguments:
            yield ToolCallArguments(index, start.arguments)
        arguments = form.read_arguments(self._reader, start)
        while True:
            try:
                text = next(arguments)
            except StopIteration as end:
                return str(end.value)
            yield None if text is None else ToolCallArguments(index, text)

    def _content(self, text: str) -> Iterator[Piece]:
        if self._syntax.tool_calls is not None:
            text = self._blanks.push(text)
            if self._num_calls and not self._has_content:
                text = text.lstrip()
        if text:
            self._has_content = True
            yield Content(text)

    def _reasoning(self, text: str) -> Iterator[Piece]:
        if text := self._blanks.push(text):
            yield Reasoning(text)


class _HeldBlanks:
    """Holds back the whitespace at the end of a text until more text follows."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """Return the text that is followed by no whitespace alone."""
        kept = text.rstrip()
        settled = "".join([*self._held, kept]) if kept else ""
        if kept:
            self._held.clear()
        self._held.append(text[len(kept) :])
        return settled

    def take(self) -> str:
        held = "".join(self._held)
        self._held.clear()
        return held

    def drop(self) -> None:
        self._held.clear()


def _never(_: str, __: int) -> int | None:
    return None
