# SPDX-License-Identifier: Apache-2.0
"""One choice of an answer while its text comes: its parts, with the log-probabilities of their tokens."""

import math
from collections import deque

from xgdn.server.logprobs import TokenReport
from xgdn.server.reply_parser import Piece, ReplyParser, ReplySyntax, ToolCallBegin
from xgdn.server.sequence import Delta


class Reply:
    """`finish_reason` is known once the last part is."""

    def __init__(self, syntax: ReplySyntax) -> None:
        self.finish_reason: str | None = None
        self._parser = ReplyParser(syntax)
        self._has_calls = False
        self._reports: deque[TokenReport] = deque()

    @property
    def end_of_thought(self) -> float:
        """Number of the text's characters up to the end of the thought."""
        return math.inf if self._parser.end_of_thought is None else self._parser.end_of_thought

    def push(self, delta: Delta) -> list[tuple[Piece | None, list[TokenReport]]]:
        """Return the new parts, each with the tokens that begin before its end and after that of the part before.

        The last one of all may be None: what is left when the reply ends.
        """
        self._reports += delta.logprobs
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        self._has_calls |= any(isinstance(piece, ToolCallBegin) for piece, _ in pieces)
        parts: list[tuple[Piece | None, list[TokenReport]]] = []
        for piece, end in pieces:
            parts.append((piece, self._reports_before(end)))
        if delta.finish_reason is not None:
            has_called = self._has_calls and delta.finish_reason == "stop"
            self.finish_reason = "tool_calls" if has_called else delta.finish_reason
            if self._reports or not parts:
                parts.append((None, self._reports_before(math.inf)))
        return parts

    def _reports_before(self, text_offset: float) -> list[TokenReport]:
        reports = []
        while self._reports and self._reports[0].text_offset < text_offset:
            reports.append(self._reports.popleft())
        return reports
