# SPDX-License-Identifier: Apache-2.0
"""The text of a sequence that grows token by token."""

from collections.abc import Sequence

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what the bytes of an unfinished character decode to


class Detokenizer:
    """Turns generated tokens into text, in pieces that never split a character.

    A token may hold some bytes of a character only, and a decoder may look at the token before (a leading space). So
    the tokens of the last piece are decoded again together with those that follow it, and a tail of replacement
    characters waits until further tokens settle it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt)  # begins and, without the tokens that follow the last piece, ends with a character
        self._num_context = len(self._window)
        self._num_given = len(self._decode())  # characters of the window's text that have been returned or were there

    def push(self, token: int) -> str:
        """The text that `token` settles; empty inside a character."""
        self._window.append(token)
        text = self._decode()
        settled = text.rstrip(_REPLACEMENT)
        piece = settled[self._num_given :]
        if piece and settled == text:
            del self._window[: self._num_context]
            self._num_context = len(self._window)
            self._num_given = len(self._decode())
        else:
            self._num_given += len(piece)
        return piece

    def finish(self) -> str:
        """What is still held back: a character that stayed unfinished."""
        return self._decode()[self._num_given :]

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True))
