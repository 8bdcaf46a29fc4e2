# SPDX-License-Identifier: Apache-2.0
"""Cuts a text that comes in pieces at the first stop string."""

from collections.abc import Sequence


class StopStrings:
    """The text up to the stop string that is complete first; wherever the pieces begin, the result is the same.

    What may be the beginning of a stop string is held back until further text settles it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """The text that `piece` settles. Nothing may follow once a stop string is found."""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            self.is_found = True
            self._held = ""
            return text[: min(found)[1]]
        settled = len(text) - self._length_of_beginning(text)
        self._held = text[settled:]
        return text[:settled]

    def finish(self) -> str:
        """What was held back and has not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _length_of_beginning(self, text: str) -> int:
        """The longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
