# SPDX-License-Identifier: Apache-2.0
"""The documents that clients get, as OpenAPI describes them; the tests hold real answers against these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(_Document):
    cached_tokens: int


class CompletionTokensDetails(_Document):
    reasoning_tokens: int


class Usage(_Document):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(_Document):
    tokens: list[str]
    token_logprobs: list[float | None]  # null for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Document):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id


class CompletionChoice(_Document):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(_Document):
    """A completion; of a stream, each event but the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(_Document):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Document):
    content: list[TokenLogprobs]
    refusal: None


class MessageFunction(_Document):
    name: str
    arguments: str


class MessageToolCall(_Document):
    id: str
    type: Literal["function"]
    function: MessageFunction


class ChatMessage(_Document):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(_Document):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletionResponse(_Document):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage


class MessageFunctionDelta(_Document):
    name: str | None = None
    arguments: str


class MessageToolCallDelta(_Document):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: MessageFunctionDelta


class ChatDelta(_Document):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCallDelta] | None = None


class ChatChunkChoice(_Document):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(_Document):
    """An event of a stream but the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class OutputLogprob(_Document):
    token: str
    bytes: list[int]
    logprob: float


class OutputLogprobs(OutputLogprob):
    top_logprobs: list[OutputLogprob]


class OutputText(_Document):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[OutputLogprobs]


class ThoughtText(_Document):
    type: Literal["reasoning_text"]
    text: str


OutputStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(_Document):
    id: str
    type: Literal["message"]
    status: OutputStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(_Document):
    id: str
    type: Literal["reasoning"]
    status: OutputStatus
    summary: list[Any]
    content: list[ThoughtText]


class OutputFunctionCall(_Document):
    id: str
    type: Literal["function_call"]
    status: OutputStatus
    call_id: str
    name: str
    arguments: str


class IncompleteDetails(_Document):
    reason: Literal["max_output_tokens"]


class ResponseFailure(_Document):
    code: Literal["server_error"]
    message: str


class ResponseUsage(_Document):
    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


class ResponseDocument(_Document):
    """A response; it repeats what the request says, with defaults."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputFunctionCall]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any] | None
    temperature: float
    top_p: float
    top_logprobs: int
    truncation: Literal["disabled"]
    background: Literal[False]
    metadata: dict[str, str]
    store: bool
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream, with further fields by its type, as OpenAI has them."""

    type: str
    sequence_number: int


class DeletedResponse(_Document):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class SessionSummary(_Document):
    id: str
    object: Literal["session"]
    created_at: int
    num_tokens: int
    is_busy: bool


class SessionDocument(SessionSummary):
    cached_tokens: int  # of these, the first whose state is held


class SessionList(_Document):
    object: Literal["list"]
    data: list[SessionSummary]


class ClosedSession(_Document):
    id: str
    object: Literal["session"]
    deleted: Literal[True]


class SessionFile(_Document):
    file: str
    object: Literal["session.file"]
    bytes: int
    created_at: int


class SessionFileList(_Document):
    object: Literal["list"]
    data: list[SessionFile]


class DeletedSessionFile(_Document):
    file: str
    object: Literal["session.file"]
    deleted: Literal[True]


class Embedding(_Document):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # as text: float32, little-endian, in base64


class EmbeddingUsage(_Document):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(_Document):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(_Document):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    default_sampling_params: dict[str, Any]


class ModelList(_Document):
    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(_Document):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorResponse(_Document):
    error: ErrorBody


class Health(_Document):
    status: Literal["ok", "stopped"]
    reason: str | None = None


class Readiness(_Document):
    status: Literal["ready", "queue_full", "shutting_down", "engine_stopped"]


class TokenizeResponse(_Document):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(_Document):
    prompt: str


class TokenizerInfo(_Document):
    tokenizer_class: str | None
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int
