# SPDX-License-Identifier: Apache-2.0
"""Every field of OpenAI's requests, sent to a live server: docs/serving_fields.md says what it must do.

The tables of that page are compared with the parameter types of OpenAI's client and with the server's schemas, so that
a field of either is in them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_completions
from openai.types.responses import response_create_params as responses
from pydantic import BaseModel

from live_server import (
    CHAT,
    GOOD,
    KEY,
    PROMPT,
    TOKENIZER,
    TOOL_TEMPLATE,
    engine,
    http_get,
    live,
    post,
    want,
    with_template,
)
from xgdn.server.responses_schemas import ResponseBody
from xgdn.server.schemas import ChatBody, CompletionBody, Message, StreamOptions

PAGE = Path(__file__).parents[2] / "docs/serving_fields.md"
MESSAGE = {"role": "user", "content": "a"}
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
COMPLETION = GOOD | GREEDY
CHAT_COMPLETION = CHAT | GREEDY
RESPONSE = {"model": "tiny", "input": "a", "temperature": 0, "max_output_tokens": 8}
STREAM = {"stream": True, "stream_options": {}}
LAST_WORDS = "if __name__ == '__main__':\n    main()\n"
SAMPLED = {"temperature": 1.9, "seed": 1}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live(engine(), with_template(tmp_path_factory.mktemp("fields"), TOOL_TEMPLATE)) as address:
        yield address


@dataclass(frozen=True)
class Section:
    """A table of the page, and all that must be in it."""

    heading: str
    path: str
    body: dict[str, Any]  # a request; its fields are replaced one by one
    types: tuple[Any, ...]  # of OpenAI's client
    schema: type[BaseModel]
    place: tuple[str | int, ...] = ()  # of the fields in the body
    last_words: dict[str, Any] = field(default_factory=dict)  # fields of a prompt after which the model ends its text
    limit: str = "max_tokens"
    needed: frozenset[str] = frozenset()  # fields that are required unless others are there

    def fields(self) -> set[str]:
        return {name for it in self.types for name in get_type_hints(it)} | self.schema.model_fields.keys()

    def required(self) -> set[str]:
        return {name for name, field in self.schema.model_fields.items() if field.is_required()} | self.needed

    def request(self, fields: dict[str, Any]) -> dict[str, Any]:
        body = copy.deepcopy(self.body)
        reduce(lambda document, key: document[key], self.place, body).update(fields)
        return body

    def param(self, name: str) -> str:
        """The name of the field in an error."""
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in (*self.place, name))
        return path.removeprefix(".")


SECTIONS = {
    section.heading: section
    for section in (
        Section(
            "Completions",
            "/v1/completions",
            COMPLETION,
            (completions.CompletionCreateParamsNonStreaming, completions.CompletionCreateParamsStreaming),
            CompletionBody,
            last_words={"prompt": LAST_WORDS},
        ),
        Section(
            "Chat completions",
            "/v1/chat/completions",
            CHAT_COMPLETION,
            (chat_completions.CompletionCreateParamsNonStreaming, chat_completions.CompletionCreateParamsStreaming),
            ChatBody,
            last_words={"chat_template_kwargs": {"thought": f"\n{LAST_WORDS}"}},
        ),
        Section(
            "Messages",
            "/v1/chat/completions",
            CHAT_COMPLETION,
            get_args(ChatCompletionMessageParam),
            Message,
            ("messages", 0),
            needed=frozenset({"content"}),
        ),
        Section(
            "Stream options",
            "/v1/completions",
            COMPLETION | STREAM,
            (ChatCompletionStreamOptionsParam,),
            StreamOptions,
            ("stream_options",),
        ),
        Section(
            "Responses",
            "/v1/responses",
            RESPONSE,
            (responses.ResponseCreateParamsNonStreaming, responses.ResponseCreateParamsStreaming),
            ResponseBody,
            last_words={"chat_template_kwargs": {"thought": f"\n{LAST_WORDS}"}},
            limit="max_output_tokens",
            needed=frozenset({"input"}),
        ),
    )
}


@dataclass(frozen=True)
class Row:
    section: Section
    field: str
    status: str
    remark: str

    def __str__(self) -> str:
        return f"{self.section.heading}-{self.field}"

    @property
    def neutral_values(self) -> list[Any]:
        """What the remark calls neutral, and null."""
        listed = re.search(r"neutral: (.*)", self.remark)
        return [None, *(json.loads(it.strip("`")) for it in listed[1].split(", "))] if listed else [None]


def rows() -> Iterator[Row]:
    section = None
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = SECTIONS[line.removeprefix("## ")]
        elif section is not None and line.startswith("| `"):
            name, status, remark = (cell.strip() for cell in line.strip("|").split("|", 2))
            yield Row(section, name.strip("`"), status, remark)


ROWS = list(rows())


def with_status(status: str) -> Any:
    return pytest.mark.parametrize("row", [row for row in ROWS if row.status == status], ids=str)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.heading)
def test_the_page_has_every_field_of_openai_and_of_the_server_once(section: Section) -> None:
    listed = [row.field for row in ROWS if row.section is section]
    assert sorted(listed) == sorted(section.fields())
    assert {row.status for row in ROWS} == {"honoured", "refused", "ignored"}


@dataclass(frozen=True)
class Asker:
    """Sends a section's request with fields replaced."""

    url: str
    section: Section

    def response(self, **fields: Any) -> httpx.Response:
        return post(self.url, self.section.request(fields), self.section.path)

    def __call__(self, **fields: Any) -> Any:
        """The document; of a stream, the list of its documents."""
        answer = self.response(**fields)
        assert answer.status_code == 200, answer.text
        if not answer.headers["content-type"].startswith("text/event-stream"):
            return answer.json()
        found = re.findall("^data: ({.*)$", answer.text, re.MULTILINE)
        return [json.loads(document) for document in found]

    def texts(self, **fields: Any) -> list[str]:
        answer = self(**fields)
        return [text for document in (answer if isinstance(answer, list) else [answer]) for text in texts_of(document)]

    def long_texts(self, **fields: Any) -> list[str]:
        return self.texts(**{self.section.limit: 48}, **fields)

    def choice(self, **fields: Any) -> Any:
        return self(**fields)["choices"][0]

    def usage(self, **fields: Any) -> tuple[int, int]:
        """Tokens of the prompt and of the answer."""
        usage = self(**fields)["usage"]
        names = ("input_tokens", "output_tokens") if "input_tokens" in usage else ("prompt_tokens", "completion_tokens")
        return usage[names[0]], usage[names[1]]

    def calls(self, **fields: Any) -> list[str]:
        """The names of the functions that are called, in an answer that has room for two calls."""
        answer = self(**{"temperature": 0, "tools": self.tools, self.section.limit: 100} | fields)
        if "output" in answer:
            return [item["name"] for item in answer["output"] if item["type"] == "function_call"]
        return [call["function"]["name"] for call in answer["choices"][0]["message"].get("tool_calls") or []]

    @property
    def tools(self) -> list[dict[str, Any]]:
        function = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
        if self.section.path == "/v1/responses":
            return [{"type": "function", **function}]
        return [{"type": "function", "function": function}]


def texts_of(document: dict[str, Any]) -> list[str]:
    """The texts in an answer, or in an event of a stream."""
    if document.get("type") == "response.output_text.delta":
        return [document["delta"]]
    if "output" in document:
        return [part["text"] for item in document["output"] for part in item.get("content", [])]
    messages = [choice.get("message") or choice.get("delta") or choice for choice in document.get("choices", [])]
    return [message.get("content") or message.get("text") or "" for message in messages]


# What shows that a field is honoured; those of one name in several sections do the same there.
EFFECTS: dict[str, Callable[[Asker], bool]] = {
    "model": lambda ask: ask.response(model="other").status_code == 404,
    "session_id": lambda ask: ask.response(session_id="none").status_code == 404,
    "prompt": lambda ask: ask.texts(prompt=PROMPT) == [want(PROMPT, 8)] != [want("a", 8)],
    "messages": lambda ask: ask.texts(messages=[MESSAGE, MESSAGE]) == [want(f"{TURN}{TURN}{ANSWER}", 8)],
    "role": lambda ask: ask.texts(role="assistant") == [want(f"# assistant: a\n{ANSWER}", 8)],
    "content": lambda ask: ask.texts(content="b") == [want(f"# user: b\n{ANSWER}", 8)],
    "chat_template_kwargs": lambda ask: (
        ask.texts(chat_template_kwargs={"thought": " b"}) == [want(f"{TURN}{ANSWER} b", 8)]
    ),
    "max_tokens": lambda ask: ask.usage(max_tokens=3)[1] == 3,
    "max_completion_tokens": lambda ask: ask.usage(max_completion_tokens=3)[1] == 3,
    "max_output_tokens": lambda ask: ask.usage(max_output_tokens=3)[1] == 3,
    "n": lambda ask: len(ask(n=3)["choices"]) == 3,
    "temperature": lambda ask: ask.texts(**SAMPLED) != ask.texts(),
    "seed": lambda ask: (
        ask.texts(temperature=1, seed=1) == ask.texts(temperature=1, seed=1) != ask.texts(temperature=1, seed=2)
    ),
    "top_p": lambda ask: ask.texts(**SAMPLED, top_p=1e-6) == ask.texts(),
    "top_k": lambda ask: ask.texts(**SAMPLED, top_k=1) == ask.texts(),
    "min_p": lambda ask: ask.texts(**SAMPLED, min_p=1) == ask.texts(),
    "presence_penalty": lambda ask: ask.long_texts(presence_penalty=2) != ask.long_texts(),
    "frequency_penalty": lambda ask: ask.long_texts(frequency_penalty=2) != ask.long_texts(),
    "repetition_penalty": lambda ask: ask.long_texts(repetition_penalty=2) != ask.long_texts(),
    "logit_bias": lambda ask: ask.texts(logit_bias={"65": 100}) == [TOKENIZER.decode([65] * 8)],
    "bad_words": lambda ask: (
        not ask.texts(bad_words=[ask.texts(**{ask.section.limit: 1})[0]])[0].startswith(
            ask.texts(**{ask.section.limit: 1})[0]
        )
    ),
    "min_tokens": lambda ask: ask.usage(min_tokens=4, **may_end(ask), **ask.section.last_words)[1] > 4,
    "stop": lambda ask: ask.texts(stop=ask.texts()[0][4:]) == [ask.texts()[0][:4]],
    "stop_token_ids": lambda ask: ask.usage(stop_token_ids=[*range(2048)])[1] == 1,
    "ignore_eos": lambda ask: (
        [ask.choice(ignore_eos=it, **ask.section.last_words)["finish_reason"] for it in (True, False)]
        == ["length", "stop"]
    ),
    "logprobs": lambda ask: ask.choice(logprobs="messages" in ask.section.body or 1)["logprobs"] is not None,
    "top_logprobs": lambda ask: (
        len(ask.choice(logprobs=True, top_logprobs=3)["logprobs"]["content"][0]["top_logprobs"]) == 3
    ),
    "response_format": lambda ask: ask.texts(response_format=ONE, ignore_eos=False) == ["1"],
    "structured_outputs": lambda ask: ask.texts(structured_outputs={"regex": "ab"}, ignore_eos=False) == ["ab"],
    "guided_json": lambda ask: ask.texts(guided_json={"const": 1}, ignore_eos=False) == ["1"],
    "guided_regex": lambda ask: ask.texts(guided_regex="ab", ignore_eos=False) == ["ab"],
    "guided_choice": lambda ask: ask.texts(guided_choice=["ab"], ignore_eos=False) == ["ab"],
    "guided_grammar": lambda ask: ask.texts(guided_grammar='start: "ab"', ignore_eos=False) == ["ab"],
    "guided_whitespace_pattern": lambda ask: (
        ask.texts(guided_json={"const": [1]}, guided_whitespace_pattern="y{0}", ignore_eos=False) == ["[1]"]
    ),
    "stream": lambda ask: len(ask(stream=True)) > 1 and "".join(ask.texts(stream=True)) == ask.texts()[0],
    "stream_options": lambda ask: ask(stream=True, stream_options={"include_usage": True})[-1]["choices"] == [],
    "continuous_usage_stats": lambda ask: all(it["usage"] for it in ask(continuous_usage_stats=True)),
    "include_usage": lambda ask: ask(include_usage=True)[-1]["usage"]["completion_tokens"] == 8,
    "echo": lambda ask: ask.texts(echo=True) == [f"a{ask.texts()[0]}"],
    "prompt_logprobs": lambda ask: "prompt_logprobs" in json.dumps(ask(prompt_logprobs=1)),
    "tools": lambda ask: ask.usage(tools=ask.tools)[0] > ask.usage()[0],
    "tool_choice": lambda ask: ask.calls(tool_choice="required", **may_end(ask))[:1] == ["now"],
    "parallel_tool_calls": lambda ask: (
        [len(ask.calls(tool_choice="required", parallel_tool_calls=it, **may_end(ask))) > 1 for it in (True, False)]
        == [True, False]
    ),
    "tool_calls": lambda ask: ask.texts(role="assistant", tool_calls=CALLS) != ask.texts(role="assistant"),
    "tool_call_id": lambda ask: ask.response(role="tool", tool_call_id="call_2").status_code == 400,
    "reasoning_content": lambda ask: (
        ask.texts(role="assistant", reasoning_content="b") == [want(f"# assistant: ba\n{ANSWER}", 8)]
    ),
    "input": lambda ask: ask.texts(input=[MESSAGE, MESSAGE]) == [want(f"{TURN}{TURN}{ANSWER}", 8)],
    "instructions": lambda ask: ask.texts(instructions="b") == [want(f"# system: b\n{TURN}{ANSWER}", 8)],
    "text": lambda ask: (
        ask.texts(text={"format": {"type": "json_schema", "name": "one", "schema": {"const": 1}}}) == ["1"]
    ),
    "include": lambda ask: len(ask(include=LOGPROBS)["output"][0]["content"][0]["logprobs"]) == 8,
    "Responses-top_logprobs": lambda ask: (
        len(ask(include=LOGPROBS, top_logprobs=3)["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 3
    ),
    "metadata": lambda ask: ask(metadata={"a": "b"})["metadata"] == {"a": "b"},
    "store": lambda ask: [is_kept(ask, store=it) for it in (True, False)] == [True, False],
    "previous_response_id": lambda ask: (
        ask.texts(input="b", previous_response_id=(first := ask())["id"])
        == [want(f"{TURN}# assistant: {texts_of(first)[0]}\n# user: b\n{ANSWER}", 8)]
    ),
}


def may_end(ask: Asker) -> dict[str, Any]:
    """The fields that let a reply end by itself."""
    return {"ignore_eos": False} if "ignore_eos" in ask.section.body else {}


def is_kept(ask: Asker, **fields: Any) -> bool:
    name = ask(**fields)["id"]
    return http_get(f"{ask.url}/v1/responses/{name}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


CALLS = [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
LOGPROBS = ["message.output_text.logprobs"]
ONE = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": 1}}}
TURN, ANSWER = "# user: a\n", "# assistant:"
# A value that a field cannot have.
WRONG_VALUES: dict[str, Any] = {"chat_template_kwargs": 1}
WRONG = {"wrong": 1}


@with_status("honoured")
def test_an_honoured_field_decides_about_the_answer(url: str, row: Row) -> None:
    ask = Asker(url, row.section)
    assert (EFFECTS.get(str(row)) or EFFECTS[row.field])(ask)
    answer = ask.response(**{row.field: WRONG_VALUES.get(row.field, WRONG)})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(row.section.param(row.field))


REFUSED: dict[str, Any] = {
    "best_of": 2,
    "suffix": "b",
    "audio": {"format": "mp3", "voice": "alloy"},
    "function_call": {"name": "add"},
    "functions": [{"name": "add"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
    "include_reasoning": False,
    "refusal": "no",
    "access_programs": {"cyber": True},
    "background": True,
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {"enabled": True},
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_options": {"mode": "explicit"},
    "reasoning": {"effort": "low"},
    "truncation": "auto",
}


@with_status("refused")
def test_a_refused_field_is_named(url: str, row: Row) -> None:
    ask = Asker(url, row.section)
    answer = ask.response(**{row.field: REFUSED[row.field]})
    error = answer.json()["error"]
    param = row.section.param(row.field)
    assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
    assert error["param"].split(".")[: param.count(".") + 1] == param.split(".")  # or a field of it
    assert f"'{error['param']}'" in error["message"]
    for neutral in row.neutral_values:
        assert ask.texts(**{row.field: neutral}) == ask.texts()


IGNORED: dict[str, Any] = {
    "user": "somebody",
    "name": "somebody",
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "b"},
    "prompt_cache_key": "b",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "b",
    "service_tier": "flex",
    "store": True,
    "annotations": [],
    "include_obfuscation": True,
    "stream_options": {"include_obfuscation": True},
    "max_tool_calls": 1,
}


@with_status("ignored")
def test_an_ignored_field_has_no_effect(url: str, row: Row) -> None:
    ask = Asker(url, row.section)
    assert ask.texts(**{row.field: IGNORED[row.field]}) == ask.texts()


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.heading)
@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_null_is_as_good_as_absent(url: str, section: Section, limit: str) -> None:
    nulls = dict.fromkeys(section.fields() - section.required())
    # A chat without any limit would take the rest of the context.
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"} & nulls.keys()
    if limits:
        nulls[limit if limit in limits else section.limit] = 8
    assert Asker(url, section).response(**nulls).status_code == 200


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda section: section.heading)
def test_a_field_of_no_table_is_refused(url: str, section: Section) -> None:
    answer = Asker(url, section).response(colour=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unknown_parameter")
    assert error["param"] == section.param("colour")
