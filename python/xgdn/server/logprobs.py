# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a sequence's tokens, with their text, their bytes and where they begin in the text."""

from collections import deque
from dataclasses import dataclass

from xgdn.engine import Logprobs
from xgdn.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0  # OpenAI's value for an impossible token; JSON has no infinity


@dataclass(frozen=True)
class NamedLogprob:
    token: str
    bytes: list[int] | None
    logprob: float | None  # None: nothing comes before the token


@dataclass(frozen=True)
class TokenReport:
    """Log-probabilities of the chosen token and of the top alternatives, and the offset of the token in the text."""

    chosen: NamedLogprob
    top: list[NamedLogprob]
    text_offset: int


class LogprobQueue:
    """Holds a sequence's reports until the text of their tokens has been sent."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[TokenReport] = deque()

    def push(self, token: int, logprobs: Logprobs, text_offset: int) -> None:
        top = [named(self._vocabulary, it.token, it.logprob) for it in logprobs.top]
        self._waiting.append(TokenReport(named(self._vocabulary, token, logprobs.chosen), top, text_offset))

    def pop_before(self, text_offset: float) -> list[TokenReport]:
        """Return the reports of tokens that begin before a character."""
        reports = []
        while self._waiting and self._waiting[0].text_offset < text_offset:
            reports.append(self._waiting.popleft())
        return reports


def named(vocabulary: Vocabulary, token: int, logprob: float) -> NamedLogprob:
    data = vocabulary.bytes(token)
    return NamedLogprob(vocabulary.name(token), None if data is None else list(data), max(logprob, _LEAST_LOGPROB))
