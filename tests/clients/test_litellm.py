# SPDX-License-Identifier: Apache-2.0
"""LiteLLM's client, by its provider for OpenAI's interface and by that for vLLM's."""

from __future__ import annotations

import os
from typing import Any, Literal

import pydantic
import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

from served import KEY, PAUSE, Reference, Server

MESSAGES = [{"role": "user", "content": "a"}]
GREEDY: dict[str, Any] = {"api_key": KEY, "temperature": 0, "max_tokens": 16, "max_retries": 0}
IGNORE_EOS = {"extra_body": {"ignore_eos": True}}
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])


def chat(server: Server, provider: str = "openai", **options: Any) -> Any:
    settings = {"model": f"{provider}/tiny", "api_base": server.url, "messages": MESSAGES} | GREEDY | IGNORE_EOS
    return litellm.completion(**settings | options)


@PROVIDERS
def test_a_chat(server: Server, reference: Reference, provider: str) -> None:
    answer = chat(server, provider)
    assert answer.choices[0].message.content == reference.chat("a")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    again = chat(server, provider, messages=[*MESSAGES, answer.choices[0].message, *MESSAGES])
    history = f"# user: a\n# assistant: {reference.chat('a')}\n# user: a\n# assistant:"
    assert again.choices[0].message.content == reference.want(history)


@PROVIDERS
def test_a_stream(server: Server, reference: Reference, provider: str) -> None:
    chunks = list(chat(server, provider, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == reference.chat("a")
    assert len(chunks) > 5
    assert litellm.stream_chunk_builder(chunks, messages=MESSAGES).usage.completion_tokens == 16


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_a_completion(server: Server, reference: Reference, provider: str) -> None:
    settings = {"model": f"{provider}/tiny", "api_base": server.url, "prompt": "a"} | GREEDY | IGNORE_EOS
    assert litellm.text_completion(**settings).choices[0].text == reference.want("a")


@PROVIDERS
def test_choices_seeds_and_logprobs(server: Server, reference: Reference, provider: str) -> None:
    answer = chat(server, provider, temperature=0.9, seed=7, n=2, logprobs=True, top_logprobs=2, user="somebody")
    wanted = [reference.chat("a", temperature=0.9, seed=seed) for seed in (7, 8)]
    assert [choice.message.content for choice in answer.choices] == wanted
    tokens = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == wanted[0]


class Paint(pydantic.BaseModel):
    colour: Literal["red", "green"]
    is_new: bool


TOOL = {"type": "function", "function": {"name": "paint", "parameters": Paint.model_json_schema()}}
ENDS = {"extra_body": {}, "max_tokens": 100}


@PROVIDERS
def test_structured_output(server: Server, provider: str) -> None:
    answer = chat(server, provider, response_format=Paint, **ENDS)
    assert Paint.model_validate_json(answer.choices[0].message.content)
    answer = chat(server, provider, response_format={"type": "json_object"}, n=2, **ENDS | {"max_tokens": 16})
    assert all(choice.message.content.lstrip().startswith("{") for choice in answer.choices)


@PROVIDERS
def test_tools(server: Server, provider: str) -> None:
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, **ENDS}
    message = chat(server, provider, **options).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "paint"
    assert Paint.model_validate_json(call.function.arguments)
    chunks = list(chat(server, provider, stream=True, **options))
    (streamed,) = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    after = chat(server, provider, messages=[*MESSAGES, message, result], tools=[TOOL])
    assert after.usage.prompt_tokens > chat(server, provider, tools=[TOOL]).usage.prompt_tokens


@PROVIDERS
def test_responses(server: Server, reference: Reference, provider: str) -> None:
    settings = {"model": f"{provider}/tiny", "api_base": server.url, "api_key": KEY, "input": "a"}
    settings |= {"temperature": 0, "max_output_tokens": 16}
    answer = litellm.responses(**settings)
    assert answer.output[0].content[0].text == reference.chat("a")
    events = litellm.responses(stream=True, **settings)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == reference.chat("a")


@PROVIDERS
def test_errors(server: Server, narrow_server: Server, provider: str) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        chat(server, provider, temperature=3)
    with pytest.raises(litellm.AuthenticationError):
        chat(server, provider, api_key="other")
    with pytest.raises(litellm.NotFoundError):
        chat(server, provider, model=f"{provider}/other")
    with pytest.raises(litellm.ContextWindowExceededError):
        chat(server, provider, max_tokens=10**6)
    with narrow_server.busy(), pytest.raises(litellm.RateLimitError):
        chat(narrow_server, provider)


@PROVIDERS
def test_who_leaves_frees_what_the_request_held(server: Server, provider: str) -> None:
    with server.left(), pytest.raises(litellm.Timeout):
        chat(server, provider, max_tokens=7000, timeout=0.5)


def test_retries_come_when_the_server_says(narrow_server: Server, reference: Reference) -> None:
    with narrow_server.busy_once() as seconds_since:
        answer = chat(narrow_server, max_retries=1)
        assert seconds_since() >= PAUSE
    assert answer.choices[0].message.content == reference.chat("a")
