# SPDX-License-Identifier: Apache-2.0
"""Answers of /v1/responses: items of output, as a document or as events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from xgdn.sampling_defaults import SamplingDefaults, first_given
from xgdn.server.api_error import ApiError
from xgdn.server.formats import ChatFormat
from xgdn.server.generation import Generation
from xgdn.server.logprobs import NamedLogprob, TokenReport
from xgdn.server.metrics import Metrics
from xgdn.server.reply import Reply
from xgdn.server.reply_parser import Content, Piece, Reasoning, ReplySyntax, ToolCallArguments, ToolCallBegin
from xgdn.server.responses_schemas import ResponseBody
from xgdn.server.schemas import StreamOptions
from xgdn.server.sequence import Delta

_Event = tuple[str, dict[str, Any]]  # type, fields


class ResponsesFormat(ChatFormat):
    """A chat whose messages are called input."""

    prompt_param = "input"


class ResponseAnswer:
    """The document, or the server-sent events, that answer a request.

    Args:
        keep: called with the document of a response that has ended, unless the request says not to store it.
    """

    def __init__(
        self,
        generation: Generation,
        body: ResponseBody,
        syntax: ReplySyntax,
        defaults: SamplingDefaults,
        metrics: Metrics,
        keep: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._generation = generation
        self._metrics = metrics
        self._keep = keep
        self._is_kept = body.store is not False
        self._reply = Reply(syntax)
        self._output = _Output(has_logprobs=generation.has_logprobs)
        self._num_events = 0
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            **_echoed(body, defaults),
        }

    def document(self, whole: Sequence[Delta]) -> bytes:
        """Return the response as a JSON document. Any thread may call it, since a long document takes a while."""
        (reply,) = whole
        for _ in self._progress(reply):
            pass
        return to_json(self._ended())

    async def events(self, _: StreamOptions) -> AsyncIterator[str]:
        """Yield the same as server-sent events; an error after the status has been sent is an event too."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", {"response": self._response("in_progress")})
        try:
            async for delta in self._generation.deltas():
                for event in self._progress(delta):
                    yield self._event(*event)
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            failure = {"error": {"code": "server_error", "message": error.message}}
            yield self._event("response.failed", {"response": self._response("failed") | failure})
            return
        response = self._ended()
        yield self._event(f"response.{response['status']}", {"response": response})

    def _progress(self, delta: Delta) -> Iterator[_Event]:
        for piece, reports in self._reply.push(delta):
            if piece is not None:
                is_thought = isinstance(piece, Reasoning)
                begin = 0 if is_thought else self._reply.end_of_thought
                yield from self._output.add(piece, [it for it in reports if it.text_offset >= begin])
        if delta.finish_reason is not None:
            yield from self._output.finish("incomplete" if delta.finish_reason == "length" else "completed")

    def _ended(self) -> dict[str, Any]:
        is_cut = self._reply.finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["usage"] = self._usage()
        if self._is_kept:
            self._keep(response)
        return response

    def _response(self, status: str) -> dict[str, Any]:
        fields = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, "status": status, "output": [*self._output.items], **fields}

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": self._generation.num_tokens_before([self._reply.end_of_thought])
            },
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, kind: str, fields: Mapping[str, Any]) -> str:
        document = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(document)}\n\n"


class _Output:
    """The items of a response while it is written."""

    def __init__(self, *, has_logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []  # finished ones
        self._has_logprobs = has_logprobs
        self._item: dict[str, Any] | None = None  # under way
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def add(self, piece: Piece, reports: Sequence[TokenReport]) -> Iterator[_Event]:
        """Yield the events of a further piece, with the tokens that it consists of."""
        kind = _ITEM_TYPES[type(piece)]
        if isinstance(piece, ToolCallBegin) or self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            yield from self._open(_new_item(piece))
        if isinstance(piece, ToolCallBegin):
            return
        self._text.append(piece.text)
        fields: dict[str, Any] = {**self._place(), "delta": piece.text}
        if isinstance(piece, Content):
            logprobs = [_logprob(report) for report in reports] if self._has_logprobs else []
            self._logprobs += logprobs
            fields["logprobs"] = logprobs
        yield f"{_EVENTS[kind]}.delta", fields

    def finish(self, status: str) -> Iterator[_Event]:
        """Yield the events of the end; a reply without anything is an empty message."""
        if self._item is None and not self.items:
            yield from self._open(_new_item(Content("")))
        yield from self._close(status)

    def _open(self, item: dict[str, Any]) -> Iterator[_Event]:
        self._item = item
        yield "response.output_item.added", {"output_index": len(self.items), "item": dict(item)}
        if item["type"] != "function_call":
            yield "response.content_part.added", {**self._place(), "part": self._part("", [])}

    def _close(self, status: str) -> Iterator[_Event]:
        item = self._item
        if item is None:
            return
        text = "".join(self._text)
        place = self._place()
        if item["type"] == "function_call":
            yield "response.function_call_arguments.done", {**place, "name": item["name"], "arguments": text}
            item["arguments"] = text
        else:
            logprobs = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            yield f"{_EVENTS[item['type']]}.done", {**place, "text": text, **logprobs}
            part = self._part(text, self._logprobs)
            yield "response.content_part.done", {**place, "part": part}
            item["content"] = [part]
        item["status"] = status
        self._item, self._text, self._logprobs = None, [], []
        self.items.append(item)
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        place = {"item_id": self._item["id"], "output_index": len(self.items)}
        return place if self._item["type"] == "function_call" else {**place, "content_index": 0}

    def _part(self, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        assert self._item is not None
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


_ITEM_TYPES: dict[type, str] = {
    Content: "message",
    Reasoning: "reasoning",
    ToolCallBegin: "function_call",
    ToolCallArguments: "function_call",
}
_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


def _new_item(piece: Piece) -> dict[str, Any]:
    number = uuid.uuid4().hex
    match piece:
        case ToolCallBegin():
            call = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            return {"id": f"fc_{number}", "type": "function_call", "status": "in_progress", **call}
        case Reasoning():
            return {"id": f"rs_{number}", "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        case _:
            message = {"role": "assistant", "content": []}
            return {"id": f"msg_{number}", "type": "message", "status": "in_progress", **message}


def _logprob(report: TokenReport) -> dict[str, Any]:
    return {**_named(report.chosen), "top_logprobs": [_named(it) for it in report.top]}


def _named(entry: NamedLogprob) -> dict[str, Any]:
    return {"token": entry.token, "bytes": entry.bytes or [], "logprob": entry.logprob}


def _echoed(body: ResponseBody, defaults: SamplingDefaults) -> dict[str, Any]:
    """Return what a response repeats of its request, with the values that apply."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    text = {"format": {"type": "text"}, **given.get("text", {})}
    return {
        "model": body.model,
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "tools": given.get("tools", []),
        "tool_choice": given.get("tool_choice", "auto"),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "text": text,
        "reasoning": given.get("reasoning"),
        "temperature": first_given(body.temperature, defaults.temperature, 1.0),
        "top_p": first_given(body.top_p, defaults.top_p, 1.0),
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "background": False,
        "metadata": body.metadata or {},
        "store": body.store is not False,
        "user": body.user,
    }
