# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of tokens, in the two shapes of OpenAI's: tokens as text and as bytes, and where they begin."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xgdn.engine import Logprobs
from xgdn.vocabulary import Vocabulary

_LEAST_LOGPROB = -9999.0  # OpenAI's for what cannot be; JSON has no infinity


@dataclass(frozen=True)
class NamedLogprob:
    token: str
    bytes: list[int] | None
    logprob: float


@dataclass(frozen=True)
class TokenReport:
    """A chosen token beside its likeliest rivals, and the character of the text at which it begins."""

    chosen: NamedLogprob
    top: list[NamedLogprob]
    text_offset: int


class LogprobQueue:
    """Holds a sequence's reports until the text of their tokens is given."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[TokenReport] = deque()

    def push(self, token: int, logprobs: Logprobs, text_offset: int) -> None:
        top = [self._named(rival.token, rival.logprob) for rival in logprobs.top]
        self._waiting.append(TokenReport(self._named(token, logprobs.chosen), top, text_offset))

    def pop_before(self, text_offset: float) -> list[TokenReport]:
        """Those of the tokens that begin before a character."""
        reports = []
        while self._waiting and self._waiting[0].text_offset < text_offset:
            reports.append(self._waiting.popleft())
        return reports

    def _named(self, token: int, logprob: float) -> NamedLogprob:
        data = self._vocabulary.bytes(token)
        name = self._vocabulary.name(token)
        return NamedLogprob(name, None if data is None else list(data), max(logprob, _LEAST_LOGPROB))


def completion_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """As in answers of /v1/completions: parallel lists."""
    return {
        "tokens": [report.chosen.token for report in reports],
        "token_logprobs": [report.chosen.logprob for report in reports],
        "top_logprobs": [_by_text([*report.top, report.chosen]) for report in reports],
        "text_offset": [report.text_offset for report in reports],
    }


def _by_text(entries: Sequence[NamedLogprob]) -> dict[str, float]:
    """Of entries with the same text the first stays."""
    logprobs: dict[str, float] = {}
    for entry in entries:
        logprobs.setdefault(entry.token, entry.logprob)
    return logprobs


def chat_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """As in answers of /v1/chat/completions: an object per token."""
    content = [{**vars(report.chosen), "top_logprobs": [vars(it) for it in report.top]} for report in reports]
    return {"content": content, "refusal": None}
