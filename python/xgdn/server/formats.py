# SPDX-License-Identifier: Apache-2.0
"""OpenAI's two wire formats of an answer."""

from collections.abc import Sequence
from typing import Any

from xgdn.server.logprobs import NamedLogprob, TokenReport


class CompletionFormat:
    """Documents of /v1/completions."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    operation = "text_completion"  # as OpenTelemetry names it
    prompt_param = "prompt"
    default_max_tokens: int | None = 16  # OpenAI's

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return _completion_logprobs(reports)

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first_deltas(self) -> list[dict[str, Any]]:
        return []


class ChatFormat:
    """Documents of /v1/chat/completions."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    operation = "chat"
    prompt_param = "messages"
    default_max_tokens: int | None = None  # to the end of the context

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return _chat_logprobs(reports)

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def first_deltas(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]


Format = CompletionFormat | ChatFormat


def _completion_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """Parallel lists."""
    return {
        "tokens": [report.chosen.token for report in reports],
        "token_logprobs": [report.chosen.logprob for report in reports],
        "top_logprobs": [_by_text([*report.top, report.chosen]) for report in reports],
        "text_offset": [report.text_offset for report in reports],
    }


def _by_text(entries: Sequence[NamedLogprob]) -> dict[str, float]:
    """By text; of entries with the same text, the first."""
    logprobs: dict[str, float] = {}
    for entry in entries:
        logprobs.setdefault(entry.token, entry.logprob)
    return logprobs


def _chat_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """An object per token."""
    content = [{**vars(report.chosen), "top_logprobs": [vars(it) for it in report.top]} for report in reports]
    return {"content": content, "refusal": None}
