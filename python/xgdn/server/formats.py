# SPDX-License-Identifier: Apache-2.0
"""OpenAI's two wire formats of an answer."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from xgdn.server.logprobs import NamedLogprob, TokenReport
from xgdn.server.prompt_reports import EchoedPrompt
from xgdn.server.reply_parser import Content, Piece, Reasoning, ReplySyntax, ToolCallArguments, ToolCallBegin


class CompletionFormat:
    """Documents of /v1/completions."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    operation = "text_completion"  # as OpenTelemetry names it
    prompt_param = "prompt"
    default_max_tokens: int | None = 16  # OpenAI's
    syntax = ReplySyntax()  # text alone
    is_for_prompts = True  # several of them: what is said of a prompt is part of its choices

    def __init__(self, echoes: Sequence[EchoedPrompt] = ()) -> None:
        self.echoes = echoes  # for each prompt, if they are part of the answer

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return _completion_logprobs(reports)

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": _text(pieces, Content)}

    def delta(self, piece: Piece | None) -> dict[str, Any]:
        return self.choice([] if piece is None else [piece])

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
    is_for_prompts = False
    echoes: Sequence[EchoedPrompt] = ()

    def __init__(self, syntax: ReplySyntax) -> None:
        self.syntax = syntax

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return _chat_logprobs(reports)

    def choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, reasoning, calls = _text(pieces, Content), _text(pieces, Reasoning), _calls(pieces)
        is_content_absent = not content and (reasoning or calls)
        message = {"role": "assistant", "content": None if is_content_absent else content, "refusal": None}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    def delta(self, piece: Piece | None) -> dict[str, Any]:
        match piece:
            case Content(text):
                return {"delta": {"content": text}}
            case Reasoning(text):
                return {"delta": {"reasoning_content": text}}
            case ToolCallBegin():
                return {"delta": {"tool_calls": [{"index": piece.index, **_call(piece, "")}]}}
            case ToolCallArguments(index, text):
                return {"delta": {"tool_calls": [{"index": index, "function": {"arguments": text}}]}}
            case None:
                return {"delta": {}}

    def first_deltas(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]


Format = CompletionFormat | ChatFormat


def _text(pieces: Sequence[Piece], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, kind))


def _calls(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    arguments: dict[int, list[str]] = defaultdict(list)
    for piece in pieces:
        if isinstance(piece, ToolCallArguments):
            arguments[piece.index].append(piece.text)
    return [_call(piece, "".join(arguments[piece.index])) for piece in pieces if isinstance(piece, ToolCallBegin)]


def _call(begin: ToolCallBegin, arguments: str) -> dict[str, Any]:
    return {"id": begin.id, "type": "function", "function": {"name": begin.name, "arguments": arguments}}


def _completion_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """Parallel lists."""
    return {
        "tokens": [report.chosen.token for report in reports],
        "token_logprobs": [report.chosen.logprob for report in reports],
        "top_logprobs": [_by_text([*report.top, report.chosen]) for report in reports],
        "text_offset": [report.text_offset for report in reports],
    }


def _by_text(entries: Sequence[NamedLogprob]) -> dict[str, float] | None:
    """By text; of entries with the same text, the first. None where nothing comes before the token."""
    logprobs: dict[str, float] = {}
    for entry in entries:
        if entry.logprob is not None:
            logprobs.setdefault(entry.token, entry.logprob)
    return logprobs or None


def _chat_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """An object per token."""
    content = [{**vars(report.chosen), "top_logprobs": [vars(it) for it in report.top]} for report in reports]
    return {"content": content, "refusal": None}
