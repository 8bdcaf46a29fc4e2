# SPDX-License-Identifier: Apache-2.0
"""Truncation of a streamed text at the first stop string."""

import re
from bisect import bisect_left
from collections.abc import Sequence

_FIRST_SURROGATE = 0xD800  # no text has one, so these stand for special tokens
_NUM_SURROGATES = 0x800


class StopStrings:
    """The text up to the stop string that is complete first; how the text is split into pieces makes no difference.

    What may be the beginning of a stop string is held back until further text settles it. The name of a special token
    in a stop string stands for the token, which leaves no text, and for its letters as well.

    Args:
        stops: the stop strings.
        special_names: matches the name of every special token.
    """

    def __init__(self, stops: Sequence[str], special_names: re.Pattern[str] | None = None) -> None:
        self._symbols: dict[str, str] = {}  # stand-ins for the special tokens that occur in a stop string
        self._by_text = [_Matcher(stop) for stop in stops]
        marked = [] if special_names is None else [special_names.sub(self._mark, stop) for stop in stops]
        self._by_tokens = [_Matcher(pattern) for pattern, stop in zip(marked, stops, strict=False) if pattern != stop]
        self._matchers = [*self._by_text, *self._by_tokens]
        self._held = ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """Return the text that is final after `piece`. Nothing may follow once a stop string is found."""
        num_held = len(self._held)
        text = self._held + piece
        for i, character in enumerate(piece if self._matchers else ""):
            if found := [it.num_characters for it in self._matchers if it.push(character)]:
                return self._cut(text, num_held + i + 1 - max(found))
        return self._settle(text)

    def watches(self, special_token: str) -> bool:
        """Return whether a stop string contains the name of this token."""
        return special_token in self._symbols

    def push_special(self, special_token: str) -> str:
        """Return the text that is final after a token that `watches`."""
        symbol = self._symbols[special_token]
        if found := [it.num_characters for it in self._by_tokens if it.push(symbol)]:
            return self._cut(self._held, len(self._held) - max(found))
        return self._settle(self._held)

    def finish(self) -> str:
        """Return the text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _mark(self, name: re.Match[str]) -> str:
        if name[0] not in self._symbols and len(self._symbols) < _NUM_SURROGATES:
            self._symbols[name[0]] = chr(_FIRST_SURROGATE + len(self._symbols))
        return self._symbols.get(name[0], name[0])

    def _cut(self, text: str, end: int) -> str:
        self.is_found = True
        self._held = ""
        return text[:end]

    def _settle(self, text: str) -> str:
        settled = len(text) - max((it.num_characters for it in self._matchers), default=0)
        self._held = text[settled:]
        return text[:settled]


class _Matcher:
    """Matcher of Knuth, Morris and Pratt for a string of characters and of surrogates for special tokens.

    Its table grows with the part that has been matched, so a long stop string costs no more than the text does.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._borders = [0]  # [i]: the longest proper beginning of pattern[: i + 1] that is its end, too
        self._num_matched = 0
        self._specials = [match.start() for match in re.finditer("[\ud800-\udfff]", pattern)]

    @property
    def num_characters(self) -> int:
        """Number of characters of the text in the matched part."""
        return self._num_matched - bisect_left(self._specials, self._num_matched)

    def push(self, symbol: str) -> bool:
        """Match one more symbol; return whether the pattern is complete, after which nothing may follow."""
        self._num_matched = self._continue(self._num_matched, symbol)
        while len(self._borders) < self._num_matched:
            self._borders.append(self._continue(self._borders[-1], self._pattern[len(self._borders)]))
        return self._num_matched == len(self._pattern)

    def _continue(self, length: int, symbol: str) -> int:
        """Return the longest prefix of the pattern that the text ends with, from `length` before `symbol`."""
        while length > 0 and self._pattern[length] != symbol:
            length = self._borders[length - 1]
        return length + (self._pattern[length] == symbol)
