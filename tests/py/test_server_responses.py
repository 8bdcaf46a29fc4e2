# SPDX-License-Identifier: Apache-2.0
"""/v1/responses, read by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from live_server import KEY, TOKENIZER, engine, http_client, http_get, live, metrics, openai_client, post, with_template
from scripted_engine import ScriptedEngine, live_scripted
from tool_templates import HERMES, TEMPLATES
from xgdn.server.api_keys import ApiKey
from xgdn.server.response_schemas import ResponseDocument
from xgdn.server.response_store import ResponseStore, StoredResponse
from xgdn.server.responses_schemas import ResponseBody, to_messages

ASK: dict[str, Any] = {"model": "tiny", "input": "Hi"}
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
THINKING = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, str]]:
    with live_scripted(tmp_path_factory.mktemp("responses"), HERMES, max_stored_responses=4) as scripted:
        yield scripted


@pytest.fixture
def client(scripted: tuple[ScriptedEngine, str]) -> Iterator[openai.OpenAI]:
    with openai_client(scripted[1]) as it:
        yield it


def test_a_text_is_answered(scripted: tuple[ScriptedEngine, str], client: openai.OpenAI) -> None:
    scripted_engine, _ = scripted
    scripted_engine.replies = ["Hello!"]
    answer = client.responses.create(**ASK, instructions="Be brief.", temperature=0.5, metadata={"a": "b"})
    assert (answer.output_text, answer.status, answer.error) == ("Hello!", "completed", None)
    assert [item.type for item in answer.output] == ["message"]
    assert (answer.instructions, answer.temperature, answer.top_p, answer.metadata) == (
        "Be brief.",
        0.5,
        1.0,
        {"a": "b"},
    )
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in scripted_engine.prompts[-1]
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens == len(TOKENIZER.encode(scripted_engine.prompts[-1]).ids)
    assert usage.output_tokens == len(TOKENIZER.encode("Hello!").ids) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert usage.input_tokens_details.cached_tokens == 0


def test_a_limit_makes_a_response_incomplete(scripted: tuple[ScriptedEngine, str], client: openai.OpenAI) -> None:
    scripted[0].replies = ["Hello, it is I, the model that has been asked."]
    answer = client.responses.create(**ASK, max_output_tokens=4)
    assert (answer.status, answer.output[-1].status) == ("incomplete", "incomplete")  # type: ignore[union-attr]
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**ASK, max_output_tokens=4, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == answer.output_text


def test_thought_text_and_calls_are_items_that_go_back(
    scripted: tuple[ScriptedEngine, str], client: openai.OpenAI
) -> None:
    scripted_engine, _ = scripted
    scripted_engine.replies = [f"Hm.\n</think>\n\nLet me see.\n{CALL}"]
    first = client.responses.create(**ASK, tools=[TOOL], extra_body=THINKING)
    thought, _, call = first.output
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert thought.content[0].text == "Hm."  # type: ignore[union-attr]
    assert first.output_text == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Bern"})  # type: ignore[union-attr]
    assert first.usage is not None
    assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5 degrees"}  # type: ignore[union-attr]
    scripted_engine.replies = ["5 degrees."]
    said = {"role": "user", "content": "Hi"}
    # Stateless, as objects and as documents, and by id.
    documents = [item.model_dump(exclude_none=True) for item in first.output]
    for output in (first.output, documents):
        sent: Any = [said, *output, result]
        stateless = client.responses.create(model="tiny", input=sent, tools=[TOOL], extra_body=THINKING)
        prompt = scripted_engine.prompts[-1]
        assert stateless.output[0].content[0].text == "5 degrees."  # type: ignore[union-attr]
        assert "<think>\nHm.\n</think>\n\nLet me see.\n<tool_call>" in prompt
        assert "<tool_response>\n5 degrees\n</tool_response>" in prompt
    by_id = client.responses.create(
        model="tiny", input=[result], previous_response_id=first.id, tools=[TOOL], extra_body=THINKING
    )
    assert scripted_engine.prompts[-1] == prompt
    assert by_id.previous_response_id == first.id


def test_a_stream_has_the_events_of_openai_s(scripted: tuple[ScriptedEngine, str], client: openai.OpenAI) -> None:
    scripted_engine, _ = scripted
    scripted_engine.replies = [f"Hm, hm.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"]
    events = list(client.responses.create(**ASK, tools=[TOOL], extra_body=THINKING, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    short = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    call = ["output_item.added", *(f"function_call_arguments.{it}" for it in ("delta", "done")), "output_item.done"]
    assert short == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    response: Any = events[-1].response  # type: ignore[union-attr]
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    for i, item in enumerate(response.output):
        own = [event for event in events if getattr(event, "output_index", None) == i]
        assert own[0].item.id == own[-1].item.id == item.id  # type: ignore[union-attr]
        assert own[-1].item == item  # type: ignore[union-attr]
        assert {event.item_id for event in own[1:-1]} == {item.id}  # type: ignore[union-attr]
        text = "".join(event.delta for event in own if event.type.endswith(".delta"))  # type: ignore[union-attr]
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
    # As the client itself reads it, and as one document.
    with client.responses.stream(**ASK, tools=[TOOL], extra_body=THINKING) as stream:  # type: ignore[call-overload]
        final = stream.get_final_response()
    whole = client.responses.create(**ASK, tools=[TOOL], extra_body=THINKING)
    for answer in (final, whole):
        assert answer.output_text == response.output_text == "Let me see."
        assert answer.usage == response.usage
    assert client.responses.retrieve(response.id).output == response.output


def test_a_conversation_goes_on_by_id_until_it_is_deleted(
    scripted: tuple[ScriptedEngine, str], client: openai.OpenAI
) -> None:
    scripted_engine, url = scripted
    scripted_engine.replies = ["Hello!"]
    first = client.responses.create(**ASK, instructions="Be brief.")
    second = client.responses.create(model="tiny", input="Who?", previous_response_id=first.id, stream=True)
    *_, last = second
    assert scripted_engine.prompts[-1].startswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
    )
    third = client.responses.create(model="tiny", input="Why?", previous_response_id=last.response.id)  # type: ignore[union-attr]
    assert scripted_engine.prompts[-1].count("Hello!") == 2
    assert "Be brief." not in scripted_engine.prompts[-1]
    assert client.responses.retrieve(third.id) == third
    client.responses.delete(third.id)
    for ask in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(third.id)
        assert missing.value.code == "response_not_found"
    for gone in (third.id, "resp_0"):
        with pytest.raises(openai.BadRequestError) as info:
            client.responses.create(model="tiny", input="Go on.", previous_response_id=gone)
        assert (info.value.code, info.value.param) == ("previous_response_not_found", "previous_response_id")
    private = client.responses.create(**ASK, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(private.id)
    # Four are kept: those used last.
    for _ in range(2):
        client.responses.create(**ASK)
    client.responses.retrieve(first.id)
    client.responses.create(**ASK)
    client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last.response.id)  # type: ignore[union-attr]
    answer = http_get(f"{url}/v1/responses/{first.id}?stream=true", headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


def test_a_response_is_for_the_key_that_asked(tmp_path: Path) -> None:
    keys = [ApiKey(name=name, key=name) for name in ("anna", "ben")]
    with live_scripted(tmp_path, HERMES, api_keys=keys) as (scripted_engine, url):
        scripted_engine.replies = ["Hello!"]
        with http_client(timeout=60) as http:
            anna, ben = (
                openai.OpenAI(base_url=f"{url}/v1", api_key=name, max_retries=0, http_client=http)
                for name in ("anna", "ben")
            )
            answer = anna.responses.create(**ASK)
            assert anna.responses.retrieve(answer.id).id == answer.id
            for ask in (ben.responses.retrieve, ben.responses.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(answer.id)
            with pytest.raises(openai.BadRequestError):
                ben.responses.create(**ASK, previous_response_id=answer.id)


def test_the_store_is_bounded_in_size() -> None:
    store = ResponseStore(1000)
    for i in range(10):
        store.put(None, StoredResponse({"id": str(i)}, [], 20 * 2**20))
    assert [i for i in range(10) if store.get(None, str(i)) is not None] == [7, 8, 9]
    store.delete(None, "7")
    store.put(None, StoredResponse({"id": "a"}, [], 20 * 2**20))
    assert store.get(None, "8") is not None


def test_logprobs_of_the_text(scripted: tuple[ScriptedEngine, str], client: openai.OpenAI) -> None:
    scripted_engine, _ = scripted
    scripted_engine.replies = ["Hm.\n</think>\n\nHello there."]
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "extra_body": THINKING}
    answer = client.responses.create(**ASK, temperature=0, **options)
    told = answer.output[-1].content[0].logprobs  # type: ignore[union-attr]
    assert all(len(entry.top_logprobs) == 2 for entry in told)
    num_tokens = sum(begin >= len("Hm.\n</think>") for begin, _ in TOKENIZER.encode(scripted_engine.replies[0]).offsets)
    assert len(told) == num_tokens
    events = list(client.responses.create(**ASK, temperature=0, stream=True, **options))
    deltas = [event.logprobs for event in events if event.type == "response.output_text.delta"]
    assert [it.logprob for part in deltas for it in part] == [it.logprob for it in told]
    assert len([part for part in deltas if part]) > 2


def test_documents_are_as_described(scripted: tuple[ScriptedEngine, str]) -> None:
    scripted_engine, url = scripted
    scripted_engine.replies = [f"<think>Hm.</think>Well. {CALL}"]
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer = post(url, ASK | {"tools": [TOOL], **logprobs}, "/v1/responses")
    ResponseDocument.model_validate_json(answer.content, strict=True)
    lines = post(url, ASK | {"tools": [TOOL], "stream": True}, "/v1/responses").text.splitlines()
    documents = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        document["type"] for document in documents
    ]
    for document in documents:
        if "response" in document:
            ResponseDocument.model_validate_json(json.dumps(document["response"]), strict=True)


def test_a_failure_is_an_event(scripted: tuple[ScriptedEngine, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from xgdn.detokenize import Detokenizer

    scripted_engine, url = scripted
    scripted_engine.replies = ["Hello!"]
    before = metrics(url).get("xgdn_errors_total engine_error", 0)

    def fail(_: Detokenizer, __: int) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(Detokenizer, "push", fail)
    with openai_client(url) as client:
        *_, last = client.responses.create(**ASK, stream=True)
        assert last.type == "response.failed"
        assert (last.response.status, last.response.error.message) == ("failed", "no text")  # type: ignore[union-attr]
        with pytest.raises(openai.InternalServerError):
            client.responses.create(**ASK)
    assert metrics(url)["xgdn_errors_total engine_error"] == before + 2


FLAG = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_grammar_makes_the_small_model_keep_to_a_format(template: str, tmp_path: Path) -> None:
    folder = with_template(tmp_path)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text(template)
    tool = TOOL | {"parameters": FLAG}
    ask: dict[str, Any] = {"model": "tiny", "input": "Hi", "temperature": 0}
    with live(engine(folder), folder, has_reasoning=False) as url, openai_client(url) as client:
        form: Any = {"format": {"type": "json_schema", "name": "flag", "schema": FLAG}}
        answer = client.responses.create(**ask, text=form)
        assert json.loads(answer.output_text)["a"] in (True, False)
        assert answer.status == "completed"
        for choice in ("required", {"type": "function", "name": "get_weather"}):
            answer = client.responses.create(**ask, tools=[tool], tool_choice=choice, parallel_tool_calls=False)
            (call,) = answer.output
            assert call.name == "get_weather"  # type: ignore[union-attr]
            assert json.loads(call.arguments)["a"] in (True, False)  # type: ignore[union-attr]
        bad = FLAG | {"properties": {"a": {"not": {}}}}
        bad_text = {"text": {"format": {"type": "json_schema", "name": "flag", "schema": bad}}}
        bad_tool = {"tools": [tool | {"parameters": bad}], "tool_choice": "required"}
        answers = [post(url, ask | it, "/v1/responses") for it in (bad_text, bad_tool)]
    params = [answer.json()["error"]["param"] for answer in answers]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert params == [f"{place}.properties.a.not" for place in ("text.format.schema", "tools[0].parameters")]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"input": ""}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": 3}, "invalid_type", "input"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "invalid_value", "input[0].type"),
        ({"input": [{"role": "user"}]}, "missing_required_parameter", "input[0].content"),
        ({"input": [{"role": "tool", "content": "a"}]}, "invalid_value", "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "unknown_parameter",
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "invalid_value", "input"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "context_length_exceeded", "input"),
        ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [TOOL | {"name": "a b"}]}, "invalid_value", "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools[1].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "unsupported_parameter", "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "b"}}, "invalid_value", "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp", "server_label": "b"}}, "unknown_parameter", "tool_choice"),
        ({"include": ["file_search_call.results"]}, "invalid_value", "include[0]"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"reasoning": {"effort": "low"}}, "unsupported_parameter", "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "unsupported_parameter", "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "a"}}, "unsupported_parameter", "prompt"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"logit_bias": {"9999999": 1}}, "invalid_value", "logit_bias"),
        ({"chat_template_kwargs": {"tools": 1}}, "unsupported_parameter", "chat_template_kwargs.tools"),
        ({"colour": 1}, "unknown_parameter", "colour"),
        ({"model": "other"}, "model_not_found", "model"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_the_place_of_what_is_wrong_is_told(
    scripted: tuple[ScriptedEngine, str], change: dict[str, Any], code: str, param: str
) -> None:
    answer = post(scripted[1], ASK | change, "/v1/responses")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404 if code == "model_not_found" else 400, code)
    assert error["param"] == param or (code == "unknown_parameter" and error["param"].startswith(param))


def test_neutral_values_and_nulls_are_accepted(scripted: tuple[ScriptedEngine, str]) -> None:
    scripted_engine, url = scripted
    scripted_engine.replies = ["Hello!"]
    nulls = dict.fromkeys(ResponseBody.model_fields.keys() - {"model", "input"})
    neutral = {"background": False, "truncation": "disabled", "text": {"format": {"type": "text"}}, "store": True}
    free = {"service_tier": "auto", "user": "me", "max_tool_calls": 3, "include": ["reasoning.encrypted_content"]}
    for body in (nulls, neutral, free, {"stream_options": {"include_obfuscation": False}, "stream": True}):
        assert post(url, ASK | body, "/v1/responses").status_code == 200


def test_every_field_of_openai_s_is_known() -> None:
    assert ResponseCreateParamsStreaming.__annotations__.keys() <= ResponseBody.model_fields.keys()


def test_items_become_messages() -> None:
    def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
        body = ResponseBody.model_validate({"model": "tiny", "input": list(items)})
        return to_messages(body.input)  # type: ignore[arg-type]

    thought = {"type": "reasoning", "id": "a", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "Well."}]}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "5"}]}
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert messages(thought, said, call, result, said) == [
        {"role": "assistant", "reasoning_content": "Hm.", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "5"},
        {"role": "assistant", "content": "Well."},
    ]
    assert [message["content"] for message in messages(said, said, thought, call)] == ["Well.", "Well.", None]
    assert messages(call, call) == [{"role": "assistant", "content": None, "tool_calls": calls * 2}]


def test_instructions_come_first_in_one_system_message() -> None:
    body = ResponseBody.model_validate({"model": "tiny", "input": "Hi", "instructions": "Be brief."})
    user, developer = {"role": "user", "content": "Hi"}, {"role": "developer", "content": "Be kind."}
    assert body.chat([user])["messages"] == [{"role": "system", "content": "Be brief."}, user]
    assert body.chat([developer, user])["messages"] == [{"role": "system", "content": "Be brief.\n\nBe kind."}, user]
