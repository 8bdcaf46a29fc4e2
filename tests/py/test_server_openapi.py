# SPDX-License-Identifier: Apache-2.0
"""/openapi.json against the server that it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from live_server import (
    CHAT,
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    TOKENIZER,
    engine,
    http_get,
    live,
    post,
    with_template,
)
from xgdn.server import response_schemas
from xgdn.server.api_keys import ApiKey
from xgdn.server.app import create_app
from xgdn.server.openapi import ENDPOINTS, Endpoint, describe
from xgdn.server.settings import Settings

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    answer = http_get(f"{url}/openapi.json")  # without a key
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def references(part: Any) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [found for value in part.values() for found in references(value)]
    return [found for value in part for found in references(value)] if isinstance(part, list) else []


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # of GET and HEAD
def test_every_route_is_described_and_no_other() -> None:
    app = create_app(engine(), TOKENIZER, Settings(CHECKPOINT, "tiny"))
    paths = app.openapi()["paths"]  # as FastAPI sees them, without their bodies
    served = {(method, path) for path, methods in paths.items() for method in methods if method != "head"}
    assert served == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["info"]["title"] == "xgdn"
    schemas = document["components"]["schemas"]
    found = references(document)
    assert found
    assert {reference.removeprefix("#/components/schemas/") for reference in found} <= schemas.keys()
    operations = {(m, p): operation for p, item in document["paths"].items() for m, operation in item.items()}
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    for (method, path), operation in operations.items():
        assert operation.get("security") == ([{"key": []}] if "401" in operation["responses"] else None)
        if method == "post":
            codes = operation["responses"].keys()
            assert {"200", "400", "401", "413", "429"} <= codes
            assert not path.startswith("/v1/") or {"404", "500", "503"} <= codes


def test_bodies_are_described_as_they_are_checked(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    body = schemas["CompletionBody"]
    assert set(body["required"]) == {"model", "prompt"}
    assert body["additionalProperties"] is False
    assert body["properties"]["model"] == {"const": "tiny"}
    _, _, ids, _ = body["properties"]["prompt"]["anyOf"]
    assert ids["items"] == {"type": "integer", "minimum": 0, "maximum": engine().vocab_size - 1}
    assert body["properties"]["suffix"]["enum"] == [None]
    assert set(schemas["ChatBody"]["required"]) == {"model", "messages"}
    for name in ("CompletionBody", "ChatBody", "EmbeddingBody"):
        untyped = [field for field, schema in schemas[name]["properties"].items() if not schema.keys() - {"title"}]
        assert untyped == []


def test_without_keys_none_is_asked_for() -> None:
    open_to_all = describe(Settings(CHECKPOINT, "tiny"), 100)
    assert "securitySchemes" not in open_to_all["components"]
    assert not any("security" in operation for item in open_to_all["paths"].values() for operation in item.values())
    with_keys = describe(Settings(CHECKPOINT, "tiny", api_keys=[ApiKey(name="a", key="b")]), 100)
    assert with_keys["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def hold(model: type[BaseModel], document: bytes | str) -> None:
    """Fail where a real answer is not as described."""
    model.model_validate_json(document, strict=True)


@pytest.mark.parametrize("body", [GOOD | {"logprobs": 2}, CHAT | {"logprobs": True, "top_logprobs": 2}, GOOD, CHAT])
def test_answers_are_as_described(url: str, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    (endpoint,) = [it for it in ENDPOINTS if it.path == path]
    body = body | IGNORE_EOS | {"max_tokens": 3, "n": 2}
    hold(model_of(endpoint), post(url, body, path).content)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert endpoint.event is not None
    events = [line for line in post(url, body | options, path).text.splitlines() if line.startswith("data: {")]
    assert len(events) > 3
    for event in events:
        hold(endpoint.event, event.removeprefix("data: "))


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_as_described(encoding: str, tmp_path: Path) -> None:
    with_template(tmp_path)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    (tmp_path / "Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    with live(engine(tmp_path), tmp_path) as url:
        answer = post(url, {"model": "tiny", "input": ["a", "b"], "encoding_format": encoding}, "/v1/embeddings")
    assert answer.status_code == 200
    hold(response_schemas.EmbeddingResponse, answer.content)


def model_of(endpoint: Endpoint) -> type[BaseModel]:
    assert not isinstance(endpoint.response, str)
    return endpoint.response


def test_other_documents_are_as_described(url: str) -> None:
    for endpoint in ENDPOINTS:
        if endpoint.method == "get" and not {"{response_id}", "{session_id}"} & {*endpoint.path.split("/")}:
            answer = http_get(url + endpoint.path.replace("{name}", "tiny"), headers=HEADERS)
            assert answer.status_code == 200
            if isinstance(endpoint.response, str):
                assert answer.headers["Content-Type"].startswith(endpoint.response)
            else:
                hold(endpoint.response, answer.content)
    for answer in (post(url, b"{"), post(url, GOOD, key="wrong"), http_get(f"{url}/nothing")):
        hold(response_schemas.ErrorResponse, answer.content)
    assert json.loads(post(url, b"{").content)["error"]["type"] == "invalid_request_error"
