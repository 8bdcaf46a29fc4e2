# SPDX-License-Identifier: Apache-2.0
"""Request bodies, checked as OpenAI checks them: strict types, no unknown fields, null for a default.

A check ends with the first thing that is wrong, so that a long body full of mistakes costs no more than another.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, from_json

from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.prompt_field import PROMPT_TYPE, Prompts
from xgdn.server.sampling_fields import SamplingFields
from xgdn.server.session_schemas import SessionName
from xgdn.server.strict_body import (
    INVALID_TYPE,
    MISSING,
    OF_A_FIELD,
    UNKNOWN,
    UNSUPPORTED,
    Neutral,
    StrictBody,
    refuse_field,
)
from xgdn.server.structured_output import StructuredOutputFields
from xgdn.server.tool_schemas import NamedToolChoice, Tool, ToolCalls, ToolChoice, Tools

_MAX = 2**31 - 1
_MAX_STOPS = 16  # OpenAI takes 4; evaluation harnesses send more
_Token = Annotated[int, Field(ge=0, le=_MAX)]
_StopString = Annotated[str, Field(min_length=1, max_length=4096)]


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's extension: the usage so far in every chunk, and at the end
    include_obfuscation: bool | None = None  # without effect: nothing is padded


class GenerationBody(SamplingFields, StructuredOutputFields, StrictBody):
    """Fields that completions and chat completions share."""

    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=_MAX)
    stop: _StopString | Annotated[list[_StopString], Field(max_length=_MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions of OpenAI's interface.
    stop_token_ids: Annotated[list[_Token], Field(max_length=4096, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    session_id: SessionName | None = None
    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Number of top alternatives to report for each token of the prompt; None: no report."""
        return self.prompt_logprobs

    def check_session(self, num_prompts: int) -> None:
        """Raise ApiError for fields that a request of a session cannot have."""
        if num_prompts != 1:
            raise bad_request(f"'session_id': expected one prompt with it, got {num_prompts}.", "session_id")
        if self.n not in (None, 1):
            raise bad_request(f"'n': expected 1 with 'session_id', got {self.n}.", "n")
        if self.prompt_logprobs is not None:
            raise bad_request("'prompt_logprobs': expected no 'session_id' with it.", "prompt_logprobs")

    def parameters(self) -> dict[str, Any]:
        """Return what the request says about sampling, for its trace."""
        values = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return {"model": self.model, "choices": self.n or 1, "stop": self.stops, **values}

    @property
    def num_logprobs(self) -> int | None:
        """Number of top alternatives to report for each token; None: no log-probabilities at all."""
        raise NotImplementedError


class CompletionBody(GenerationBody):
    max_tokens: int | None = Field(None, ge=0, le=_MAX)
    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: Annotated[Any, Neutral(None, 1)] = None
    suffix: Annotated[Any, Neutral(None)] = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        of_echo = self.logprobs if self.echo else None
        return max((it for it in (self.prompt_logprobs, of_echo) if it is not None), default=None)

    def check_session(self, num_prompts: int) -> None:
        super().check_session(num_prompts)
        if self.echo:
            raise bad_request("'echo': expected no 'session_id' with it.", "echo")


class EmbeddingBody(StrictBody):
    """Request of /v1/embeddings."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None  # without effect
    dimensions: Annotated[Any, Neutral(None)] = None


class TextPart(StrictBody):
    type: Literal["text"]
    text: str


class Message(StrictBody):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: ToolCalls | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # an extension
    # Fields of OpenAI's answers, accepted without effect.
    annotations: list[dict[str, Any]] | None = None
    # Refused, except for neutral values.
    refusal: Annotated[Any, Neutral(None)] = None
    audio: Annotated[Any, Neutral(None)] = None
    function_call: Annotated[Any, Neutral(None, "none", "auto")] = None

    @model_validator(mode="after")
    def _suits_its_role(self) -> "Message":
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content"):
                if getattr(self, name):
                    refuse_field(name, "expected in messages of the assistant only")
        if self.role == "tool" and not self.tool_call_id:
            refuse_field("tool_call_id", "required", MISSING)
        if self.role != "tool" and self.tool_call_id is not None:
            refuse_field("tool_call_id", "expected in messages of tools only")
        if self.content is None and not self.tool_calls:
            if "content" not in self.model_fields_set:
                refuse_field("content", "required", MISSING)
            if self.role != "assistant" or not self.reasoning_content:  # a thought alone, cut by max_tokens
                refuse_field("content", "expected a text or a list of parts", INVALID_TYPE)
        return self

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # an extension
    # Accepted without effect.
    prediction: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # Refused, except for neutral values.
    include_reasoning: Annotated[Any, Neutral(None, True)] = None  # vLLM's
    functions: Annotated[Any, Neutral(None, [])] = None
    function_call: Annotated[Any, Neutral(None, "none", "auto")] = None
    modalities: Annotated[Any, Neutral(None, ["text"])] = None
    audio: Annotated[Any, Neutral(None)] = None
    moderation: Annotated[Any, Neutral(None)] = None
    reasoning_effort: Annotated[Any, Neutral(None)] = None
    verbosity: Annotated[Any, Neutral(None, "medium")] = None
    web_search_options: Annotated[Any, Neutral(None)] = None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("'top_logprobs': expected 'logprobs' to be true with it.", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the reply may call, all of them if it is free to choose."""
        return [] if self.tool_choice == "none" else self.tools or []

    @model_validator(mode="after")
    def _knows_its_tools(self) -> "ChatBody":
        names = [tool.function.name for tool in self.tools or []]
        for i, name in enumerate(names):
            if name in names[:i]:
                refuse_field(f"tools[{i}].function.name", f"expected different names, got {name} twice")
        if self.tool_choice not in (None, "none", "auto") and not names:
            refuse_field("tool_choice", "expected 'tools' with it")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            got = self.tool_choice.function.name
            refuse_field("tool_choice.function.name", f"expected one of {', '.join(names)}, got {got}")
        return self

    @model_validator(mode="after")
    def _answers_calls(self) -> "ChatBody":
        calls: set[str] = set()
        for i, message in enumerate(self.messages):
            calls.update(call.id for call in message.tool_calls or [])
            if message.tool_call_id is not None and message.tool_call_id not in calls:
                refuse_field(f"messages[{i}].tool_call_id", "expected the id of a call in an earlier message")
        return self


_AnyBody = TypeVar("_AnyBody", bound=StrictBody)


def parse(schema: type[_AnyBody], data: bytes) -> _AnyBody:
    """Return the request in `data`; raises ApiError for its first error."""
    try:
        document = from_json(data)
    except ValueError as error:
        raise bad_request(f"The body is no JSON document. {error}.", code="invalid_json") from None
    if not isinstance(document, dict):
        raise bad_request("The body is no JSON object.", code="invalid_json")
    return check(schema, document)


def check(schema: type[_AnyBody], document: dict[str, Any]) -> _AnyBody:
    """Return a document as a request; raises ApiError for its first error."""
    try:
        body = schema.model_validate(document)
    except ValidationError as error:
        raise _explain(error, document) from None
    if isinstance(body, GenerationBody) and body.stream_options is not None and not body.stream:
        raise bad_request("'stream_options': expected 'stream' to be true with it.", "stream_options")
    if isinstance(body, GenerationBody) and body.prompt_logprobs is not None and body.stream:
        raise bad_request("'prompt_logprobs': expected 'stream' to be false with it.", "prompt_logprobs")
    return body


def _explain(error: ValidationError, document: dict[str, Any]) -> ApiError:
    errors = error.errors(include_url=False, include_input=False)
    # A value that may have one of several types has an error for each; choose that of the type that came furthest.
    name = errors[0]["loc"][:1]
    places = [(_place(it, document), it) for it in errors if it["loc"][:1] == name]
    place, first = max(places, key=lambda entry: (len(entry[0]), not _is_of_wrong_type(entry[1])))
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == UNKNOWN:
        return bad_request(f"Unrecognized request argument supplied: {path}.", path, "unknown_parameter")
    if first["type"] == UNSUPPORTED:
        return bad_request(f"'{path}' is not supported.", path, "unsupported_parameter")
    if first["type"] in ("missing", MISSING):
        return bad_request(f"'{path}' is required.", path, "missing_required_parameter")
    if first["type"] == PROMPT_TYPE:
        what = "a string, a list of strings, a list of token ids (32 bits, not negative) or a list of such lists"
        return bad_request(f"'{path}': expected {what}.", path, "invalid_type")
    return bad_request(
        f"'{path}': {first['msg']}.", path, "invalid_type" if _is_of_wrong_type(first) else "invalid_value"
    )


def _is_of_wrong_type(error: ErrorDetails) -> bool:
    return error["type"].endswith("_type") or error["type"] == "int_from_float"


def _place(error: ErrorDetails, body: dict[str, Any]) -> Sequence[int | str]:
    """Return the keys and indices that lead to the value, without the type names that pydantic puts between them."""
    place: list[int | str] = []
    document: Any = body
    for i, part in enumerate(error["loc"]):
        is_missing = error["type"] == "missing" and i + 1 == len(error["loc"])
        if isinstance(document, list) and isinstance(part, int):
            document = document[part]
            place.append(part)
        elif isinstance(document, dict) and (part in document or is_missing):
            document = document.get(part)
            place.append(part)
    if error["type"] == "union_tag_invalid":
        return [*place, error["ctx"]["discriminator"].strip("'")]
    return [*place, error["ctx"]["field"]] if error["type"] in OF_A_FIELD else place
