# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client for Python."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from served import KEY, PAUSE, Reference, Server, serve

PROMPT = "def __init__(self"
MESSAGES: Any = [{"role": "user", "content": "a"}]
GREEDY: Any = {"model": "tiny", "temperature": 0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}
LONG: Any = GREEDY | {"max_tokens": 8000}
USAGE: Any = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as it:
        yield it


def test_completions(client: openai.OpenAI, reference: Reference) -> None:
    prompts = [PROMPT, "a"]
    answer = client.completions.create(prompt=prompts, n=2, seed=7, **GREEDY | {"temperature": 0.9})
    wanted = [reference.want(prompt, temperature=0.9, seed=seed) for prompt in prompts for seed in (7, 8)]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * 16
    assert answer.usage.prompt_tokens == sum(len(reference.tokens_of(prompt)) for prompt in prompts)


def test_streams(client: openai.OpenAI, reference: Reference) -> None:
    *chunks, last = client.completions.create(prompt=PROMPT, **GREEDY, **USAGE)
    assert "".join(chunk.choices[0].text for chunk in chunks) == reference.want(PROMPT)
    assert len(chunks) > 5
    assert last.usage.completion_tokens == 16


def test_chats(client: openai.OpenAI, reference: Reference) -> None:
    text = reference.chat("a")
    ended: Any = GREEDY | {"stop": text[12:14]}  # its helper takes an answer of the greatest length for a failure
    answer = client.chat.completions.create(messages=MESSAGES, **ended)
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", text[: text.index(text[12:14])], None)
    with client.chat.completions.stream(messages=MESSAGES, stream_options={"include_usage": True}, **ended) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == message.content
    assert final.choices[0].finish_reason == answer.choices[0].finish_reason == "stop"
    assert final.usage is not None
    assert answer.usage is not None
    assert final.usage.total_tokens == answer.usage.total_tokens
    with (
        client.chat.completions.stream(messages=MESSAGES, **GREEDY) as stream,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        stream.get_final_completion()


def test_logprobs(client: openai.OpenAI) -> None:
    """The greedy token is the first alternative; probabilities of the same text are the same in both formats."""
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY).choices[0]
    assert chat.logprobs is not None
    tokens = chat.logprobs.content or []
    assert len(tokens) == 16
    assert all(token.top_logprobs[0].token == token.token for token in tokens)
    assert all(sum(math.exp(it.logprob) for it in token.top_logprobs) <= 1 + 1e-6 for token in tokens)
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == chat.message.content
    prompt = "# user: a\n# assistant:"
    completion = client.completions.create(prompt=prompt, logprobs=3, **GREEDY).choices[0]
    assert completion.logprobs is not None
    # Equal to rounding: another request may be computed in other pieces.
    assert completion.logprobs.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"colour": 1}}, openai.BadRequestError, "unknown_parameter", "colour"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "context_length_exceeded", "prompt"),
    ],
)
def test_errors_have_their_classes(client: openai.OpenAI, options: Any, error: Any, code: str, param: str) -> None:
    for stream in (False, True):
        with pytest.raises(error) as info:
            client.completions.create(prompt="a", stream=stream, **GREEDY | options)
        assert (info.value.code, info.value.param) == (code, param)


def test_a_wrong_key(server: Server) -> None:
    with (
        openai.OpenAI(base_url=server.url, api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as info,
    ):
        client.models.list()
    assert info.value.code == "invalid_api_key"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@pytest.mark.parametrize("stream", [False, True], ids=["answer", "stream"])
def test_a_timeout_frees_what_the_request_held(server: Server, stream: bool) -> None:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client, server.left():
        if stream:
            chunks = client.completions.create(prompt="a", stream=True, **LONG)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(prompt="a", timeout=0.3, **LONG)


def test_a_full_server_is_a_rate_limit(narrow_server: Server) -> None:
    with openai.OpenAI(base_url=narrow_server.url, api_key=KEY, max_retries=0) as client, narrow_server.busy():
        with pytest.raises(openai.RateLimitError) as info:
            client.completions.create(prompt="a", **GREEDY)
        assert info.value.code == "queue_full"
        assert info.value.response.headers["retry-after"] == "1"


def test_retries_come_when_the_server_says(narrow_server: Server, reference: Reference) -> None:
    with (
        openai.OpenAI(base_url=narrow_server.url, api_key=KEY, max_retries=1) as client,
        narrow_server.busy_once() as seconds_since,
    ):
        answer = client.completions.create(prompt=PROMPT, **GREEDY)
        assert seconds_since() >= PAUSE
    assert answer.choices[0].text == reference.want(PROMPT)


def test_many_at_once(server: Server, reference: Reference) -> None:
    prompts = [f"import {name}" for name in ("os", "re", "sys", "json", "math", "time", "csv", "abc")] * 3

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
            answers = await asyncio.gather(*(client.completions.create(prompt=prompt, **GREEDY) for prompt in prompts))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [reference.want(prompt) for prompt in prompts]


def test_a_stream_that_the_server_ends_is_an_error(reference: Reference) -> None:
    with (
        serve(reference.model_dir, "--shutdown-seconds", "1") as (process, server),
        openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client,
    ):
        chunks = client.completions.create(prompt="a", stream=True, **LONG)
        next(iter(chunks))
        process.terminate()
        with pytest.raises(openai.APIError) as info:
            list(chunks)
        assert info.value.code == "engine_error"


class Paint(pydantic.BaseModel):
    colour: Literal["red", "green"]
    is_new: bool


def test_structured_output(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "temperature": 0}
    parsed = (
        client.chat.completions.parse(messages=MESSAGES, response_format=Paint, **options).choices[0].message.parsed
    )
    assert isinstance(parsed, Paint)
    with client.chat.completions.stream(messages=MESSAGES, response_format=Paint, **options) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    response = client.responses.parse(input="a", text_format=Paint, **options)
    assert response.output_parsed == parsed
    text = client.completions.create(prompt="a", extra_body={"guided_regex": "[a-c]{3}d"}, **options).choices[0].text
    assert re.fullmatch("[a-c]{3}d", text)
    with pytest.raises(openai.BadRequestError) as info:
        client.completions.create(prompt="a", extra_body={"guided_json": {"type": "colour"}}, **options)
    assert (info.value.param or "").startswith("guided_json")


TOOL = openai.pydantic_function_tool(Paint, name="paint")


def test_tools(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "temperature": 0, "tools": [TOOL], "parallel_tool_calls": False}
    answer = client.chat.completions.create(messages=MESSAGES, tool_choice="required", **options).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "paint"
    assert Paint.model_validate_json(call.function.arguments)
    named: Any = {"type": "function", "function": {"name": "paint"}}
    with client.chat.completions.stream(messages=MESSAGES, tool_choice=named, **options) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    assert isinstance(streamed.function.parsed_arguments, Paint)
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == call.function.arguments
    # The conversation goes on with the call and its result.
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = client.chat.completions.create(messages=[*MESSAGES, answer.message, result], max_tokens=1, **options)
    without = client.chat.completions.create(messages=MESSAGES, max_tokens=1, **options)
    assert after.usage is not None
    assert without.usage is not None
    assert after.usage.prompt_tokens > without.usage.prompt_tokens + len(call.function.arguments) / 10


def test_responses(client: openai.OpenAI, reference: Reference) -> None:
    options: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 16}
    answer = client.responses.create(input="a", **options)
    assert answer.output_text == reference.chat("a")
    assert (answer.status, answer.usage and answer.usage.output_tokens) == ("incomplete", 16)
    with client.responses.stream(input="a", **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    assert len(deltas) > 5
    following = client.responses.create(input="b", previous_response_id=answer.id, **options)
    assert following.output_text == reference.want(
        f"# user: a\n# assistant: {answer.output_text}\n# user: b\n# assistant:"
    )
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_a_tool_of_responses(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **TOOL["function"]}]
    options: Any = {"model": "tiny", "temperature": 0, "tools": tools, "parallel_tool_calls": False}
    answer = client.responses.create(input="a", tool_choice="required", **options)
    (call,) = answer.output
    assert call.type == "function_call"
    assert Paint.model_validate_json(call.arguments)
    items: Any = [
        {"role": "user", "content": "a"},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]
    assert (
        client.responses.create(input=items, max_output_tokens=4, **options).usage.input_tokens
        > answer.usage.input_tokens
    )


def test_embeddings_of_a_model_without_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.embeddings.create(model="tiny", input="a")
    assert info.value.code == "no_embeddings"
