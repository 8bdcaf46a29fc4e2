# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI description of the server, made from the models that check the bodies.

FastAPI does not see them, because bodies are parsed in threads of their own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from xgdn.server.response_schemas import (
    ChatCompletionChunk,
    ChatCompletionResponse,
    ClosedSession,
    CompletionResponse,
    DeletedResponse,
    DeletedSessionFile,
    DetokenizeResponse,
    EmbeddingResponse,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    ResponseDocument,
    ResponseEvent,
    SessionDocument,
    SessionFile,
    SessionFileList,
    SessionList,
    TokenizeResponse,
    TokenizerInfo,
)
from xgdn.server.responses_schemas import ResponseBody
from xgdn.server.schemas import ChatBody, CompletionBody, EmbeddingBody
from xgdn.server.session_schemas import CreateSessionBody, ForkSessionBody, SaveSessionBody, TruncateSessionBody
from xgdn.server.settings import Settings
from xgdn.server.tokenization import DetokenizeBody, TokenizeBody

_JSON = "application/json"
_READ_ERRORS = (401,)
_TEXT_ERRORS = (400, 401, 404, 413, 429)
_WORK_ERRORS = (400, 401, 404, 409, 413, 429, 500, 503)
_SESSION_ERRORS = (400, 401, 404, 409, 413, 429, 500, 501, 503)


@dataclass(frozen=True)
class Endpoint:
    """A path: `response` is its document, or the media type of one that is not JSON."""

    method: str
    path: str
    summary: str
    response: type[BaseModel] | str
    body: type[BaseModel] | None = None
    event: type[BaseModel] | None = None  # of a stream
    query: Mapping[str, Any] = field(default_factory=dict)  # schemas of parameters, none of which is required
    has_done: bool = True  # the last event is [DONE]
    errors: tuple[int, ...] = ()
    unavailable: type[BaseModel] | None = None  # the document of a 503 that is no error

    @property
    def is_open(self) -> bool:
        """Whether it answers without a key."""
        return not self.path.startswith(("/v1/", "/stats", "/tokenize", "/detokenize"))


ENDPOINTS = (
    Endpoint(
        "post",
        "/v1/completions",
        "Continues prompts.",
        CompletionResponse,
        body=CompletionBody,
        event=CompletionResponse,
        errors=_WORK_ERRORS,
    ),
    Endpoint(
        "post",
        "/v1/chat/completions",
        "Answers a conversation.",
        ChatCompletionResponse,
        body=ChatBody,
        event=ChatCompletionChunk,
        errors=_WORK_ERRORS,
    ),
    Endpoint(
        "post",
        "/v1/embeddings",
        "Embeds texts.",
        EmbeddingResponse,
        body=EmbeddingBody,
        errors=_WORK_ERRORS,
    ),
    Endpoint(
        "post",
        "/v1/responses",
        "Answers a conversation, which may go on by the answer's id.",
        ResponseDocument,
        body=ResponseBody,
        event=ResponseEvent,
        has_done=False,
        errors=_WORK_ERRORS,
    ),
    Endpoint("get", "/v1/responses/{response_id}", "Returns an answer.", ResponseDocument, errors=(400, 401, 404)),
    Endpoint("delete", "/v1/responses/{response_id}", "Forgets an answer.", DeletedResponse, errors=(400, 401, 404)),
    Endpoint(
        "post",
        "/v1/sessions",
        "Opens a session, empty or of a file.",
        SessionDocument,
        body=CreateSessionBody,
        errors=_SESSION_ERRORS,
    ),
    Endpoint("get", "/v1/sessions", "Lists the open sessions.", SessionList, errors=_READ_ERRORS),
    Endpoint("get", "/v1/sessions/{session_id}", "Describes a session.", SessionDocument, errors=(*_READ_ERRORS, 404)),
    Endpoint(
        "delete", "/v1/sessions/{session_id}", "Closes a session.", ClosedSession, errors=(*_READ_ERRORS, 404, 409)
    ),
    Endpoint(
        "post",
        "/v1/sessions/{session_id}/fork",
        "Opens another session with the same tokens and the same state.",
        SessionDocument,
        body=ForkSessionBody,
        errors=_SESSION_ERRORS,
    ),
    Endpoint(
        "post",
        "/v1/sessions/{session_id}/truncate",
        "Takes back a session's last tokens.",
        SessionDocument,
        body=TruncateSessionBody,
        errors=_SESSION_ERRORS,
    ),
    Endpoint(
        "post",
        "/v1/sessions/{session_id}/save",
        "Writes a session to a file of the server.",
        SessionFile,
        body=SaveSessionBody,
        errors=_SESSION_ERRORS,
    ),
    Endpoint("get", "/v1/session_files", "Lists the files of sessions.", SessionFileList, errors=_READ_ERRORS),
    Endpoint(
        "delete",
        "/v1/session_files/{file}",
        "Deletes the file of a session.",
        DeletedSessionFile,
        errors=(*_READ_ERRORS, 404, 501),
    ),
    Endpoint("get", "/v1/models", "Lists the model.", ModelList, errors=_READ_ERRORS),
    Endpoint("get", "/v1/models/{name}", "Describes the model.", ModelCard, errors=(*_READ_ERRORS, 404)),
    Endpoint(
        "post", "/tokenize", "Turns a text into tokens.", TokenizeResponse, body=TokenizeBody, errors=_TEXT_ERRORS
    ),
    Endpoint(
        "post", "/detokenize", "Turns tokens into text.", DetokenizeResponse, body=DetokenizeBody, errors=_TEXT_ERRORS
    ),
    Endpoint("get", "/tokenizer_info", "Tells the tokenizer's special tokens.", TokenizerInfo, errors=_READ_ERRORS),
    Endpoint("get", "/health", "Tells whether the process can serve.", Health, unavailable=Health),
    Endpoint("get", "/ready", "Tells whether a request would be taken now.", Readiness, unavailable=Readiness),
    Endpoint("get", "/metrics", "Metrics for Prometheus.", "text/plain"),
    Endpoint("get", "/stats", "Figures of this moment.", _JSON, errors=_READ_ERRORS),
    Endpoint(
        "get",
        "/stats/history",
        "Samples of the last ten minutes.",
        _JSON,
        query={"since": {"type": "number"}},
        errors=(400, *_READ_ERRORS),
    ),
    Endpoint("get", "/", "A page for browsers.", "text/html"),
    Endpoint("get", "/openapi.json", "This description.", _JSON),
)


def describe(settings: Settings, vocab_size: int) -> dict[str, Any]:
    """Return the document of /openapi.json, of OpenAPI 3.1."""
    schemas = _schemas(settings.model_name, vocab_size)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "xgdn",
            "version": version("xgdn"),
            "description": "OpenAI's interface for one model. Unknown fields and values that cannot be honoured are "
            "refused.",
        },
        "paths": {},
        "components": {"schemas": schemas},
    }
    if settings.api_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, has_keys=bool(settings.api_keys))
        document["paths"].setdefault(endpoint.path, {})[endpoint.method] = operation
    return document


def _schemas(model_name: str, vocab_size: int) -> dict[str, Any]:
    models: list[type[BaseModel]] = [ErrorResponse]
    for endpoint in ENDPOINTS:
        for model in (endpoint.response, endpoint.body, endpoint.event, endpoint.unavailable):
            if isinstance(model, type) and model not in models:
                models.append(model)
    _, document = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = document["$defs"]
    bodies = {endpoint.body.__name__ for endpoint in ENDPOINTS if endpoint.body is not None}
    for name in bodies:
        if "model" not in schemas[name]["properties"]:
            continue
        is_required = "model" in schemas[name].get("required", [])
        schemas[name]["properties"]["model"] = {"const": model_name} if is_required else {"enum": [model_name, None]}
    for name, prompts in (("CompletionBody", "prompt"), ("EmbeddingBody", "input")):
        _limit_tokens(schemas[name]["properties"][prompts], vocab_size)
    return schemas


def _limit_tokens(schema: Any, vocab_size: int) -> None:
    """Say in the schema of a prompt which token ids there are."""
    if isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema["maximum"] = vocab_size - 1
        for part in schema.values():
            _limit_tokens(part, vocab_size)
    elif isinstance(schema, list):
        for part in schema:
            _limit_tokens(part, vocab_size)


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for part in schema for name in _references(part)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"].rsplit("/", 1)[1]] if isinstance(schema.get("$ref"), str) else []
    return own + [name for part in schema.values() for name in _references(part)]


def _operation(endpoint: Endpoint, *, has_keys: bool) -> dict[str, Any]:
    words = endpoint.path.replace("/v1", "").translate(str.maketrans("", "", "{}.")).split("/")
    operation: dict[str, Any] = {
        "operationId": "_".join([endpoint.method, *filter(None, words)]),
        "summary": endpoint.summary,
        "responses": _responses(endpoint),
    }
    if has_keys and not endpoint.is_open:
        operation["security"] = [{"key": []}]
    if names := re.findall(r"\{(\w+)\}", endpoint.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if endpoint.query:
        operation["parameters"] = [{"name": name, "in": "query", "schema": it} for name, it in endpoint.query.items()]
    if endpoint.body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": _reference(endpoint.body)}}}
    return operation


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    if isinstance(endpoint.response, str):
        schema = {} if endpoint.response == _JSON else {"type": "string"}
        content: dict[str, Any] = {endpoint.response: {"schema": schema}}
    else:
        content = {_JSON: {"schema": _reference(endpoint.response)}}
    if endpoint.event is not None:
        content["text/event-stream"] = {"schema": _event(endpoint.event, has_done=endpoint.has_done)}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    for status in endpoint.errors:
        responses[str(status)] = _response(status, ErrorResponse)
    if endpoint.unavailable is not None:
        responses["503"] = _response(503, endpoint.unavailable)
    return responses


def _event(model: type[BaseModel], *, has_done: bool) -> dict[str, Any]:
    """Return the schema of one server-sent event, which stands for the stream: OpenAPI 3.1 knows no other."""
    document = {"anyOf": [_reference(model), _reference(ErrorResponse)]}
    data: dict[str, Any] = {"contentMediaType": _JSON, "contentSchema": document}
    description = f"A server-sent event: a {model.__name__} or an ErrorResponse."
    if has_done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
        description += " The last is [DONE]."
    return {
        "type": "object",
        "description": description,
        "properties": {"data": {"type": "string", **data}},
        "required": ["data"],
    }


def _response(status: int, model: type[BaseModel]) -> dict[str, Any]:
    return {"description": HTTPStatus(status).phrase, "content": {_JSON: {"schema": _reference(model)}}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
