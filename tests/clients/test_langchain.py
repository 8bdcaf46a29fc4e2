# SPDX-License-Identifier: Apache-2.0
"""LangChain's client, langchain-openai."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from served import KEY, PAUSE, Reference, Server

PROMPT = "def __init__(self"
SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "api_key": KEY,
    "temperature": 0,
    "max_tokens": 16,
    "max_retries": 0,
    "extra_body": {"ignore_eos": True},
}


def chat_model(server: Server, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=server.url, **SETTINGS | settings)


def completion_model(server: Server, **settings: Any) -> OpenAI:
    return OpenAI(base_url=server.url, **SETTINGS | settings)


def test_a_chat(server: Server, reference: Reference) -> None:
    model = chat_model(server)
    answer = model.invoke([SystemMessage("Be brief."), HumanMessage("a")])
    assert answer.content == reference.want("# system: Be brief.\n# user: a\n# assistant:")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 16
    assert answer.response_metadata["finish_reason"] == "length"
    # A conversation goes on with what came.
    history = f"# user: a\n# assistant: {answer.content}\n# user: b\n# assistant:"
    assert model.invoke([HumanMessage("a"), AIMessage(answer.content), HumanMessage("b")]).content == reference.want(
        history
    )


def test_a_chain_streams(server: Server, reference: Reference) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "{word}")]) | chat_model(server, stream_usage=True)
    chunks = list(chain.stream({"word": "a"}))
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == reference.chat("a")
    assert len(chunks) > 5
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 16


def test_batches_run_at_once(server: Server, reference: Reference) -> None:
    words = [f"word {i}" for i in range(12)]
    answers = chat_model(server).batch([[HumanMessage(word)] for word in words])
    assert [answer.content for answer in answers] == [reference.chat(word) for word in words]


def test_completions(server: Server, reference: Reference) -> None:
    model = completion_model(server)
    prompts = [PROMPT, "a", "import os"]
    assert [it[0].text for it in model.generate(prompts).generations] == [reference.want(prompt) for prompt in prompts]
    assert "".join(model.stream(PROMPT)) == reference.want(PROMPT)
    text = reference.want(PROMPT)
    assert model.invoke(PROMPT, stop=[text[8:10]]) == text[: text.index(text[8:10])]


def test_logprobs_and_seeds(server: Server, reference: Reference) -> None:
    model = chat_model(server, temperature=0.9, seed=7, logprobs=True, top_logprobs=2)
    answer = model.invoke("a")
    assert answer.content == reference.chat("a", temperature=0.9, seed=7)
    tokens = answer.response_metadata["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == answer.content
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


class Paint(BaseModel):
    """Paints it."""

    colour: Literal["red", "green"]
    is_new: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: Server, method: Any) -> None:
    model = chat_model(server, max_tokens=100, extra_body={})
    assert isinstance(model.with_structured_output(Paint, method=method).invoke("a"), Paint)


def test_tools(server: Server) -> None:
    model = chat_model(server, max_tokens=100, extra_body={})
    answer = model.bind_tools([Paint], tool_choice="any", parallel_tool_calls=False).invoke("a")
    (call,) = answer.tool_calls
    assert call["name"] == "Paint"
    assert Paint.model_validate(call["args"])
    chunks = list(model.bind_tools([Paint], tool_choice="Paint", parallel_tool_calls=False).stream("a"))
    assert [it["args"] for it in sum(chunks[1:], chunks[0]).tool_calls] == [call["args"]]
    conversation = [HumanMessage("a"), answer, ToolMessage("done", tool_call_id=call["id"])]
    after = chat_model(server).bind_tools([Paint]).invoke(conversation)
    before = chat_model(server).bind_tools([Paint]).invoke("a")
    assert after.usage_metadata is not None
    assert before.usage_metadata is not None
    assert after.usage_metadata["input_tokens"] > before.usage_metadata["input_tokens"]


def test_responses(server: Server, reference: Reference) -> None:
    model = chat_model(server, use_responses_api=True, extra_body={})
    assert model.invoke("a").text == reference.chat("a")
    chunks = list(model.stream("a"))
    assert sum(chunks[1:], chunks[0]).text == reference.chat("a")
    caller = chat_model(server, use_responses_api=True, extra_body={}, max_tokens=100)
    (call,) = caller.bind_tools([Paint], tool_choice="any", parallel_tool_calls=False).invoke("a").tool_calls
    assert Paint.model_validate(call["args"])


def test_errors(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        chat_model(server, temperature=3).invoke("a")
    assert info.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        chat_model(server, api_key="other").invoke("a")


def test_who_leaves_frees_what_the_request_held(server: Server) -> None:
    with server.left(), pytest.raises(openai.APITimeoutError):
        chat_model(server, max_tokens=7000, timeout=0.5).invoke("a")
    with server.left():
        stream = chat_model(server, max_tokens=7000).stream("a")
        next(stream)
        stream.close()


def test_retries_come_when_the_server_says(narrow_server: Server, reference: Reference) -> None:
    with narrow_server.busy_once() as seconds_since:
        answer = chat_model(narrow_server, max_retries=1).invoke("a")
        assert seconds_since() >= PAUSE
    assert answer.content == reference.chat("a")
