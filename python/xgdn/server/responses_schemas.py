# SPDX-License-Identifier: Apache-2.0
"""Bodies of /v1/responses, and what they are as bodies of /v1/chat/completions.

Whatever both interfaces have is checked by the chat's schemas.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from xgdn.server.api_error import ApiError
from xgdn.server.sampling_fields import SamplingFields
from xgdn.server.strict_body import Neutral, StrictBody, refuse_field

_MAX = 2**31 - 1
_Status = Literal["in_progress", "completed", "incomplete"]
_LOGPROBS = "message.output_text.logprobs"


class InputText(StrictBody):
    type: Literal["input_text", "output_text", "text"]
    text: str
    # Fields of an answer's parts, without effect.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_Parts = Annotated[list[InputText], Field(fail_fast=True)]


class MessageItem(StrictBody):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | _Parts
    # Without effect.
    id: str | None = None
    status: _Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(StrictBody):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str
    # Without effect.
    id: str | None = None
    status: _Status | None = None


class FunctionCallOutputItem(StrictBody):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: str | _Parts
    # Without effect.
    id: str | None = None
    status: _Status | None = None


class SummaryText(StrictBody):
    type: Literal["summary_text"]
    text: str


class ReasoningText(StrictBody):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(StrictBody):
    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    # Without effect.
    id: str | None = None
    encrypted_content: str | None = None
    status: _Status | None = None


def _with_type(item: object) -> object:
    return {"type": "message", **item} if isinstance(item, Mapping) else item


Item = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem,
    Field(discriminator="type"),
    BeforeValidator(_with_type),
]
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


class FunctionTool(StrictBody):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, Neutral(None, False)] = None
    allowed_callers: Annotated[Any, Neutral(None, ["direct"])] = None
    output_schema: Annotated[Any, Neutral(None)] = None


class ChosenFunction(StrictBody):
    type: Literal["function"]
    name: str


class TextFormat(StrictBody):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(StrictBody):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(StrictBody):
    format: Annotated[TextFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[Any, Neutral(None, "medium")] = None


class Reasoning(StrictBody):
    effort: str | None = None
    summary: Annotated[Any, Neutral(None)] = None
    generate_summary: Annotated[Any, Neutral(None)] = None
    context: Annotated[Any, Neutral(None, "auto")] = None
    mode: Annotated[Any, Neutral(None, "standard")] = None


class ResponseStreamOptions(StrictBody):
    include_obfuscation: bool | None = None  # without effect: nothing is padded


class ResponseBody(SamplingFields, StrictBody):
    """OpenAI's fields, and as extensions those of `SamplingFields` and `chat_template_kwargs`."""

    model: str
    input: str | Annotated[list[Item], Field(fail_fast=True)] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=_MAX)
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Accepted without effect: there are no tools of the server's own, and reasoning is not encrypted.
    max_tool_calls: int | None = Field(None, ge=1)
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    background: Annotated[Any, Neutral(None, False)] = None
    truncation: Annotated[Any, Neutral(None, "disabled")] = None
    conversation: Annotated[Any, Neutral(None)] = None
    prompt: Annotated[Any, Neutral(None)] = None
    context_management: Annotated[Any, Neutral(None)] = None
    moderation: Annotated[Any, Neutral(None)] = None
    access_programs: Annotated[Any, Neutral(None)] = None
    image: Annotated[Any, Neutral(None)] = None
    prompt_cache_options: Annotated[Any, Neutral(None)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ResponseBody":
        if not self.input and self.previous_response_id is None:
            refuse_field("input", "expected a text or at least one item")
        if self.top_logprobs and _LOGPROBS not in (self.include or []):
            refuse_field("top_logprobs", f"expected 'include' to have {_LOGPROBS} with it")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """Return the input as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}] if self.input else []
        return to_messages(self.input)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the body of a chat with these messages, for `ChatBody` to check; the input's are the last of them."""
        has_logprobs = _LOGPROBS in (self.include or [])
        body = {
            "model": self.model,
            "messages": _instructed(self.instructions, messages),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_chat_tool(tool) for tool in self.tools or []],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": has_logprobs,
            "top_logprobs": self.top_logprobs if has_logprobs else None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "stream": self.stream,
        }
        if isinstance(self.tool_choice, ChosenFunction):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        return body | {name: getattr(self, name) for name in SamplingFields.model_fields}

    def _response_format(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if not isinstance(form, JsonSchemaFormat):
            return None if form is None else {"type": form.type}
        named = {"name": form.name, "schema": form.schema_, "description": form.description, "strict": form.strict}
        return {"type": form.type, "json_schema": {key: value for key, value in named.items() if value is not None}}


def messages_of_output(output: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of an answer as messages of a chat."""
    return to_messages(_ITEMS.validate_python(output))


def to_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return messages: an assistant's thought, text and calls that follow each other are one."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] = {}  # the assistant's, still open
    for item in items:
        if isinstance(item, ReasoningItem):
            begins = bool(turn)
            addition: dict[str, Any] = {"reasoning_content": _thought(item)}
        elif isinstance(item, FunctionCallItem):
            begins = False
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            addition = {"tool_calls": [*turn.get("tool_calls", []), call]}
        elif isinstance(item, MessageItem) and item.role == "assistant":
            begins = bool(turn.keys() & {"content", "tool_calls"})
            addition = {"content": _text(item.content)}
        else:
            if isinstance(item, FunctionCallOutputItem):
                message = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            else:
                message = {"role": item.role, "content": _text(item.content)}
            messages += [*_closed(turn), message]
            turn = {}
            continue
        if begins:
            messages += _closed(turn)
            turn = {}
        turn |= addition
    return messages + _closed(turn)


def _closed(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": None, **turn}] if turn else []


def _thought(item: ReasoningItem) -> str:
    return "".join(part.text for part in item.content or item.summary)


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _instructed(instructions: str | None, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put instructions in front, in one message with what a system or developer says first: templates take one."""
    if not instructions:
        return list(messages)
    first = messages[0] if messages else {"role": "user"}
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    return [{"role": "system", "content": f"{instructions}\n\n{first['content']}"}, *messages[1:]]


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    given = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_unset=True)
    return {"type": "function", "function": given}


# How the places of a chat's body are called in this one, the first that fits.
_PLACES = (
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"tool_choice\.function", "tool_choice"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"max_completion_tokens|max_tokens", "max_output_tokens"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"messages(\[\d+\])?(\.\w+)*", "input"),
)


def as_asked(error: ApiError) -> ApiError:
    """Return the error about a chat's body with the places of the body of /v1/responses."""
    if error.param is None:
        return error
    for pattern, name in _PLACES:
        if found := re.match(rf"(?:{pattern})(?![a-z_])", error.param):
            param = found.expand(name) + error.param[found.end() :]
            message = error.message.replace(f"'{error.param}'", f"'{param}'")
            return ApiError(error.status, error.code, message, param=param, headers=error.headers)
    return error
