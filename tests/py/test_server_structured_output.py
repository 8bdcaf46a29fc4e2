# SPDX-License-Identifier: Apache-2.0
"""Structured output of `xgdn serve`: replies follow their grammar, and only theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from json_schemas import invalid, random_schemas
from live_server import (
    CHAT,
    GOOD,
    PROMPT,
    SLOTS,
    TOKENIZER,
    engine,
    is_at_rest,
    live,
    post,
    wait_until,
    want,
    with_template,
)
from xgdn.server.structured_output import StructuredOutputFields

COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "colours", "strict": True, "schema": COLOURS}}
COMPACT = {"structured_outputs": {"json": COLOURS, "disable_any_whitespace": True}}
CHAT_PATH = "/v1/chat/completions"


def check(schema: dict[str, Any], text: str) -> None:
    assert not invalid(schema, text), text


def texts_of(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def test_openai_s_client_gets_what_its_schema_says(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a"}]
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": 200, "response_format": STRICT}
    answers = [client.chat.completions.create(temperature=0, **options)]
    answers += [client.chat.completions.create(temperature=1.5, seed=seed, **options) for seed in range(3)]
    for answer in answers:
        assert answer.choices[0].finish_reason == "stop"
        check(COLOURS, answer.choices[0].message.content or "")


def test_json_objects(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a"}],
        temperature=0,
        logit_bias={str(TOKENIZER.token_to_id("}")): 5},
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[A-F]{2}-[0-9]{3}"}}, "[A-F]{2}-[0-9]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no", "maybe so"]}}, "yes|no|maybe so"),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z]{3}/ ">"'}}, "<[a-z]{3}>"),
        ({"guided_grammar": 'root ::= "<" [a-z] [a-z] ">"'}, "<[a-z]{2}>"),
        ({"guided_regex": r"\d{4}"}, "[0-9]{4}"),
        ({"guided_choice": ["a", "ab"]}, "ab?"),
        ({"guided_json": json.dumps({"const": [1, "x"]}), "guided_whitespace_pattern": " "}, r"\[ ?1 ?, ?\"x\" ?\]"),
        ({"structured_outputs": {"json": {"enum": [1, None]}}}, "1|null"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}}}}, "1"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", CHAT_PATH])
def test_replies_match(url: str, path: str, fields: dict[str, Any], pattern: str) -> None:
    body = (CHAT if path == CHAT_PATH else GOOD) | fields | {"max_tokens": 60}
    texts = texts_of(post(url, body | {"temperature": 0}, path))
    texts += texts_of(post(url, body | {"temperature": 1.8, "n": 3, "seed": 5}, path))
    assert all(re.fullmatch(pattern, text) for text in texts), texts


def test_each_branch_has_its_own_matcher_and_seed(url: str) -> None:
    body = GOOD | COMPACT | {"max_tokens": 60, "temperature": 1.5, "n": 4, "seed": 11}
    texts = texts_of(post(url, body))
    assert len(set(texts)) > 1
    for i, text in enumerate(texts):
        check(COLOURS, text)
        assert texts_of(post(url, body | {"n": 1, "seed": 11 + i})) == [text]


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, url: str) -> None:
    options: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0}
    options |= {"max_tokens": 200, "logprobs": True, "top_logprobs": 2, "response_format": STRICT}
    chunks = list(client.chat.completions.create(stream=True, **options))
    answer = client.chat.completions.create(**options)
    choice = answer.choices[0]
    assert "".join(part.delta.content or "" for chunk in chunks for part in chunk.choices) == choice.message.content
    check(COLOURS, choice.message.content or "")
    assert choice.logprobs is not None
    assert "".join(entry.token for entry in choice.logprobs.content or []) == choice.message.content


def test_free_requests_beside_grammars_do_not_change(url: str) -> None:
    bodies: list[dict[str, Any]] = [GOOD | {"prompt": PROMPT, "ignore_eos": True, "temperature": 0}] * 8
    bodies += [GOOD | COMPACT | {"temperature": 1.0, "seed": seed, "max_tokens": 60} for seed in range(8)]
    with ThreadPoolExecutor(SLOTS) as clients:
        answers = list(clients.map(lambda body: post(url, body), bodies[::2] + bodies[1::2]))
    texts = [answer.json()["choices"][0]["text"] for answer in answers]
    free, bound = [text for text in texts if text == want(PROMPT)], [text for text in texts if text != want(PROMPT)]
    assert len(free) == len(bound) == 8
    for text in bound:
        check(COLOURS, text)
    wait_until(lambda: is_at_rest(url))


def test_random_schemas_are_followed(url: str) -> None:
    """A part of benchmarks/structured_output.py, with the server."""
    schemas = random_schemas(300)[::6]

    def ask(i: int) -> tuple[str, str]:
        outputs = {"json": schemas[i], "disable_any_whitespace": True}
        body = {"structured_outputs": outputs, "max_tokens": 110, "temperature": 1.0, "seed": i}
        answer = post(url, GOOD | body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]

    with ThreadPoolExecutor(SLOTS) as clients:
        answers = list(clients.map(ask, range(len(schemas))))
    ended = [(schema, text) for schema, (text, reason) in zip(schemas, answers, strict=True) if reason == "stop"]
    assert len(ended) > 0.8 * len(schemas)
    for schema, text in ended:
        check(schema, text)


JSON_SCHEMA = "response_format.json_schema"


def json_schema(schema: Any = None, **fields: Any) -> dict[str, Any]:
    document = {"name": "a", "schema": {"type": "object"} if schema is None else schema} | fields
    return {"response_format": {"type": "json_schema", "json_schema": document}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": "json"}, "response_format", "invalid_type"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "text", "a": 1}}, "response_format.a", "unknown_parameter"),
        ({"response_format": {"type": "json_schema"}}, JSON_SCHEMA, "missing_required_parameter"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, JSON_SCHEMA, "invalid_type"),
        (json_schema(name=1), f"{JSON_SCHEMA}.name", "invalid_type"),
        (json_schema(name=None), f"{JSON_SCHEMA}.name", "missing_required_parameter"),
        (json_schema(strict=1), f"{JSON_SCHEMA}.strict", "invalid_type"),
        (json_schema(a=1), f"{JSON_SCHEMA}.a", "unknown_parameter"),
        (json_schema([]), f"{JSON_SCHEMA}.schema", "invalid_type"),
        (json_schema("{"), f"{JSON_SCHEMA}.schema", "invalid_value"),
        (json_schema({"items": {"if": {}}}), f"{JSON_SCHEMA}.schema.items.if", "unsupported_parameter"),
        (json_schema({"items": {"type": 1}}), f"{JSON_SCHEMA}.schema.items", "invalid_grammar"),
        ({"structured_outputs": {}}, "structured_outputs", "invalid_value"),
        ({"structured_outputs": {"a": 1}}, "structured_outputs.a", "unknown_parameter"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "invalid_type"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "invalid_grammar"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "invalid_value"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice", "invalid_type"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "invalid_type"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag", "unsupported_parameter"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "invalid_value"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "invalid_value"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "invalid_value"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "invalid_value"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
            "invalid_value",
        ),
        ({"guided_grammar": "start: b"}, "guided_grammar", "invalid_grammar"),
        ({"guided_json": "{"}, "guided_json", "invalid_value"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ],
)
def test_what_is_wrong_is_a_400_with_its_place(url: str, fields: dict[str, Any], param: str, code: str) -> None:
    for body, path in ((GOOD, "/v1/completions"), (CHAT, CHAT_PATH)):
        answer = post(url, body | fields, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
        assert param in error["message"]


def test_neutral_values_restrict_nothing(url: str) -> None:
    fields = dict.fromkeys(StructuredOutputFields.model_fields)
    body = GOOD | {"prompt": PROMPT, "ignore_eos": True, "temperature": 0, **fields}
    for neutral in (None, {"type": "text"}):
        assert post(url, body | {"response_format": neutral}).json()["choices"][0]["text"] == want(PROMPT)


REASONING = """
{%- for message in messages %}{{ message.content }}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}{{ "<think></think>" }}{% else %}{{ "<think>" }}{% endif %}
"""
HERMES = """
{%- for tool in tools or [] %}<tool_call>{{ tool.function.name }}{"name": "arguments"}</tool_call>{% endfor %}
{%- for message in messages %}{{ message.content }}{% endfor %}
"""
TOOLS = [{"type": "function", "function": {"name": "paint", "parameters": COLOURS}}]


@pytest.fixture(scope="module")
def tools_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a model that calls tools."""
    folder = with_template(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(HERMES)
    with live(engine(), folder) as address:
        yield address


@pytest.fixture(scope="module")
def reasoning_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a model whose prompts begin a thought."""
    folder = with_template(tmp_path_factory.mktemp("reasoning"))
    (folder / "chat_template.jinja").write_text(REASONING)
    with live(engine(), folder) as address:
        yield address


def test_a_grammar_begins_behind_the_thought(reasoning_url: str) -> None:
    body = CHAT | COMPACT | {"max_tokens": 60, "temperature": 0}
    free = CHAT | {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    thought, same = (post(reasoning_url, it, CHAT_PATH).json()["choices"][0]["message"] for it in (body, free))
    assert thought["content"] is None
    assert thought["reasoning_content"] == same["reasoning_content"]
    without = {"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {str(TOKENIZER.token_to_id("{")): 50}}
    (text,) = texts_of(post(reasoning_url, body | without, CHAT_PATH))
    check(COLOURS, text)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_tools_that_must_be_called_are(tools_url: str, choice: Any) -> None:
    body = CHAT | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200, "temperature": 1.5, "n": 3, "seed": 1}
    answer = post(tools_url, body | {"parallel_tool_calls": False}, CHAT_PATH)
    assert answer.status_code == 200, answer.text
    for one in answer.json()["choices"]:
        assert one["finish_reason"] == "tool_calls"
        (call,) = one["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"
        check(COLOURS, call["function"]["arguments"])


def test_grammars_of_tools_and_of_the_text_do_not_mix(tools_url: str) -> None:
    unknown = [{"type": "function", "function": {"name": "paint", "parameters": {"not": {}}}}]
    for fields, param in (
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": unknown, "tool_choice": "required"}, "tools[0].function.parameters.not"),
    ):
        answer = post(tools_url, CHAT | fields, CHAT_PATH)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    none = {"tools": TOOLS, "tool_choice": "none", "response_format": STRICT}
    (text,) = texts_of(post(tools_url, CHAT | none | {"max_tokens": 300}, CHAT_PATH))
    check(COLOURS, text)
