# SPDX-License-Identifier: Apache-2.0
"""Thoughts of a reply, told apart from its answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live_server import CHAT, TEMPLATE, TOKENIZER, openai_client, post
from scripted_engine import ScriptedEngine, live_scripted
from tool_templates import HERMES
from xgdn.server.reply_parser import Content, Reasoning, ReplyParser, ReplySyntax

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
ASK: dict[str, Any] = {"model": "tiny", "messages": [USER]}
THINK: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}


def told(text: str, *, is_open: bool) -> tuple[str, str]:
    """Reasoning and content."""
    parser = ReplyParser(ReplySyntax(has_thought=True, begins_in_thought=is_open))
    pieces = [piece for piece, _ in (*parser.push(text), *parser.finish())]
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return thought, "".join(piece.text for piece in pieces if isinstance(piece, Content))


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("Hm.\n\nWell.\n</think>\n\nHello\n", True, "Hm.\n\nWell.", "Hello\n"),
        ("<think>\nHm.\n</think>\n\nHello", False, "Hm.", "Hello"),
        ("\n<think>Hm.</think>Hello", False, "Hm.", "Hello"),
        ("<think>\n\n</think>\n\nHello", False, "", "Hello"),
        ("Hm. </thin </think>", True, "Hm. </thin", ""),
        ("Hm. ", True, "Hm. ", ""),
        ("\nHello <think>Hm.</think>", False, "", "\nHello <think>Hm.</think>"),
        (" <thi", False, "", " <thi"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
    ],
)
def test_a_thought_is_told_apart(text: str, is_open: bool, reasoning: str, content: str) -> None:
    assert told(text, is_open=is_open) == (reasoning, content)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedEngine, str]]:
    with live_scripted(tmp_path_factory.mktemp("thoughts"), HERMES) as (engine, url):
        yield engine, url


def num_tokens_before(text: str, reply: str) -> int:
    """Tokens of a reply that begin in its first part."""
    return sum(begin < len(text) for begin, _ in TOKENIZER.encode(reply).offsets)


def test_documents_and_streams_tell_a_thought(scripted: tuple[ScriptedEngine, str]) -> None:
    engine, url = scripted
    thought = "Let me see.\n</think>"
    engine.replies = [f"{thought}\n\nHello, it is I."]
    with openai_client(url) as client:
        answer = client.chat.completions.create(**ASK, **THINK)
        message = answer.choices[0].message
        assert engine.prompts[-1].endswith("<think>\n")
        assert (message.content, message.reasoning_content) == ("Hello, it is I.", "Let me see.")  # type: ignore[attr-defined]
        details = answer.usage.completion_tokens_details
        assert details.reasoning_tokens == num_tokens_before(thought, engine.replies[0])
        assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
        stream = client.chat.completions.create(**ASK, **THINK, stream=True, stream_options={"include_usage": True})
        *chunks, last = stream
        deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Let me see."
        assert "".join(delta.get("content") or "" for delta in deltas) == "Hello, it is I."
        assert sum("reasoning_content" in delta for delta in deltas) > 2
        assert last.usage == answer.usage
        # The thought goes back to the template with its message.
        engine.replies = ["Bye."]
        client.chat.completions.create(**ASK | {"messages": [USER, message, USER]})
    assert "<think>\nLet me see.\n</think>\n\nHello, it is I.<|im_end|>" in engine.prompts[-1]


def test_the_prompt_says_whether_a_reply_begins_in_a_thought(scripted: tuple[ScriptedEngine, str]) -> None:
    engine, url = scripted
    engine.replies = ["Hello"]
    for thinks, message in ((True, (None, "Hello")), (False, ("Hello", None)), (None, ("Hello", None))):
        variables = {} if thinks is None else {"chat_template_kwargs": {"enable_thinking": thinks}}
        answer = post(url, CHAT | variables, "/v1/chat/completions").json()
        got = answer["choices"][0]["message"]
        assert (got["content"], got.get("reasoning_content")) == message
        num_tokens = answer["usage"]["completion_tokens"] if thinks else 0
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_tokens}


def test_a_call_follows_a_thought(scripted: tuple[ScriptedEngine, str]) -> None:
    engine, url = scripted
    tools = [{"type": "function", "function": {"name": "now"}}]
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    engine.replies = [f"I could say {call}.\n</think>\n\n{call}"]
    body = CHAT | {"tools": tools, "chat_template_kwargs": {"enable_thinking": True}}
    choice = post(url, body, "/v1/chat/completions").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["reasoning_content"] == f"I could say {call}."
    assert len(choice["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(("template", "settings"), [(TEMPLATE, {}), (HERMES, {"has_reasoning": False})])
def test_where_nobody_thinks_tags_are_text(template: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with live_scripted(tmp_path, template, **settings) as (engine, url):
        engine.replies = ["<think>Hm.</think> Hello"]
        answer = post(url, CHAT, "/v1/chat/completions").json()
    assert answer["choices"][0]["message"]["content"] == engine.replies[0]
    assert "completion_tokens_details" not in answer["usage"]


def test_reasoning_cannot_be_left_out(scripted: tuple[ScriptedEngine, str]) -> None:
    scripted[0].replies = ["Hello"]
    for value, status in ((None, 200), (True, 200), (False, 400)):
        answer = post(scripted[1], CHAT | {"include_reasoning": value}, "/v1/chat/completions")
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == "include_reasoning"
