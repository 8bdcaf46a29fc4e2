# SPDX-License-Identifier: Apache-2.0
"""A text that arrives in pieces, read by generators that yield None to wait for the next piece.

A generator takes what it can decide upon and leaves the rest, at most the beginning of a marker. So the result does not
depend on where the text is split, and the time is linear in its length.
"""

import re
from collections.abc import Callable, Generator, Iterable
from functools import cache
from typing import TypeVar

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

Waiting = Generator[None, None, _Result]

_BLANKS = re.compile(r"\s*")


class TextReader:
    """The unread part of the text, and the part that was read since `record`."""

    def __init__(self) -> None:
        self._text = ""
        self._place = 0
        self._num_dropped = 0
        self._is_complete = False
        self._recorded: list[str] | None = None

    @property
    def offset(self) -> int:
        """Number of characters that have been read."""
        return self._num_dropped + self._place

    @property
    def is_at_end(self) -> bool:
        """Whether everything is read and nothing more will come."""
        return self._is_complete and self._place == len(self._text)

    def push(self, piece: str) -> None:
        self._text = self._text[self._place :] + piece
        self._num_dropped += self._place
        self._place = 0

    def finish(self) -> None:
        """Say that the text is complete: nothing waits any more."""
        self._is_complete = True

    def record(self, text: str = "") -> None:
        """Begin to keep what is read, behind `text`."""
        self._recorded = [text]

    def recorded(self) -> str:
        """Return what was kept, and keep no more."""
        text = "".join(self._recorded or ())
        self._recorded = None
        return text

    def blanks(self) -> Waiting[None]:
        """Read whitespace."""
        while True:
            found = _BLANKS.match(self._text, self._place)
            assert found is not None
            self._take(found.end())
            if self._place < len(self._text) or self._is_complete:
                return
            yield None

    def peek(self) -> Waiting[str]:
        """Return the next character without reading it; empty at the end."""
        while self._place == len(self._text):
            if self._is_complete:
                return ""
            yield None
        return self._text[self._place]

    def word(self, *words: str) -> Waiting[str]:
        """Read one of some words and return it; empty if none follows. What ends inside of one is read too."""
        longest = max(map(len, words))
        while True:
            rest = self._text[self._place : self._place + longest]
            for word in words:
                if rest.startswith(word):
                    return self._take(self._place + len(word))
            if not any(word.startswith(rest) for word in words):
                return ""
            if self._is_complete:
                self._take(len(self._text))
                return ""
            yield None

    def words(self, *words: str) -> Waiting[bool]:
        """Read words in this order, with whitespace before each; return whether all are there."""
        for word in words:
            yield from self.blanks()
            if not (yield from self.word(word)):
                return False
        return True

    def run(self, letters: frozenset[str], max_length: int) -> Waiting[str]:
        """Read and return as many of these letters as follow."""
        read = ""
        while len(read) < max_length and (yield from self.peek()) in letters:
            read += self._take(self._place + 1)
        return read

    def until(
        self, markers: tuple[str, ...], give: Callable[[str], Iterable[_Piece]]
    ) -> Generator[_Piece | None, None, str]:
        """Read through the first marker and return it, empty at the end; yield what `give` makes of the text before."""
        pattern = _any_of(markers)
        while True:
            found = pattern.search(self._text, self._place)
            if found is not None:
                yield from give(self._take(found.start()))
                self._take(found.end())
                return found[0]
            yield from give(self._take(len(self._text) - (0 if self._is_complete else self._num_held(markers))))
            if self._is_complete:
                return ""
            yield None

    def text_until(self, *markers: str) -> Waiting[tuple[str, str]]:
        """Read through the first marker; return the text before it and the marker, empty at the end."""
        pieces: list[str] = []

        def keep(text: str) -> tuple[()]:
            pieces.append(text)
            return ()

        marker = yield from self.until(markers, keep)
        return "".join(pieces), marker

    def scan(
        self, find_end: Callable[[str, int], int | None], give: Callable[[str], Iterable[_Piece]]
    ) -> Generator[_Piece | None, None, None]:
        """Read up to an end; yield what `give` makes of the text before.

        `find_end` is called with each further text and the place where that begins; it returns the place of the end.
        """
        while True:
            end = find_end(self._text, self._place)
            yield from give(self._take(len(self._text) if end is None else end))
            if end is not None or self._is_complete:
                return
            yield None

    def _num_held(self, markers: tuple[str, ...]) -> int:
        """Return the length of the longest end of the unread text with which a marker may begin."""
        unread = len(self._text) - self._place
        longest = min(unread, max(map(len, markers)) - 1)
        ends = (self._text[len(self._text) - length :] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(marker.startswith(end) for marker in markers)), 0)

    def _take(self, end: int) -> str:
        text = self._text[self._place : end]
        self._place = end
        if self._recorded is not None:
            self._recorded.append(text)
        return text


@cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
