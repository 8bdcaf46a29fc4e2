# SPDX-License-Identifier: Apache-2.0
"""Calls of tools: read from replies in both formats, told in documents and streams, and rendered into prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llguidance
import pytest
import transformers
from typer.testing import CliRunner

from live_server import CHAT, CHECKPOINT, TOKENIZER, openai_client, post
from scripted_engine import ScriptedEngine, live_scripted
from tool_templates import HERMES, QWEN_XML, TEMPLATES
from xgdn.cli import app as cli_app
from xgdn.server import serve
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.reply_parser import Content, Piece, Reasoning, ReplyParser, ReplySyntax, ToolCallBegin
from xgdn.server.response_schemas import ChatCompletionChunk, ChatCompletionResponse
from xgdn.server.schemas import Message
from xgdn.server.tool_call_formats import FORMATS
from xgdn.server.tool_grammar import tool_grammar
from xgdn.server.tool_parameters import Parameters
from xgdn.server.tool_schemas import NamedToolChoice, Tool, ToolChoice

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> in a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 2},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F", None]},
                "exact": {"type": "boolean"},
                "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["city"],
            "$defs": {"tag": {"type": "string"}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
ANY: dict[str, Any] = {"type": "function", "function": {"name": "any-1", "parameters": {"type": "object"}}}
TOOLS = [Tool.model_validate(it) for it in (WEATHER, NOW, ANY)]
PARAMETERS = {tool.function.name: tool.parameters for tool in TOOLS}
USER = {"role": "user", "content": "Hi"}
ASK: dict[str, Any] = {"model": "tiny", "messages": [USER], "tools": [WEATHER, NOW]}


def syntax(name: str | None, **options: Any) -> ReplySyntax:
    return ReplySyntax(tool_calls=None if name is None else FORMATS[name](PARAMETERS), **options)


def pieces_of(parts: Iterable[str], of: ReplySyntax) -> list[Piece]:
    parser = ReplyParser(of)
    located = [it for part in parts for it in parser.push(part)] + parser.finish()
    ends = [end for _, end in located]
    assert ends == sorted(ends)
    return [piece for piece, _ in located]


def assembled(pieces: Sequence[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content, and the calls."""
    texts = {Content: "", Reasoning: ""}
    names: list[str] = []
    arguments: list[str] = []
    for piece in pieces:
        if isinstance(piece, (Content, Reasoning)):
            texts[type(piece)] += piece.text
        elif isinstance(piece, ToolCallBegin):
            assert piece.index == len(names)
            names.append(piece.name)
            arguments.append("")
        else:
            arguments[piece.index] += piece.text
    return texts[Reasoning], texts[Content], list(zip(names, arguments, strict=True))


def read(name: str | None, text: str, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    return assembled(pieces_of([text], syntax(name, **options)))[1:]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def xml(name: str, **values: str) -> str:
    parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


WELL = '{"city": "Bern } \\"x\\" \\\\", "tags": ["é", {}]}'
READ_HERMES = {
    "one": (hermes("f", WELL), "", [("f", WELL)]),
    "behind text": (f"Let me see.\n\n{hermes('f', '{}')}\n", "Let me see.", [("f", "{}")]),
    "two": (hermes("f", "{}") + "\n" + hermes("g", '{"a": 1}'), "", [("f", "{}"), ("g", '{"a": 1}')]),
    "with text between": (hermes("f", "{}") + "\nAnd:\n" + hermes("g", "{}"), "And:", [("f", "{}"), ("g", "{}")]),
    "in one line": ('<tool_call>{"name":"f","arguments":{"a":[]}}</tool_call>', "", [("f", '{"a":[]}')]),
    "the name last": ('<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', "", [("f", '{"a": 1}')]),
    "no arguments": ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
    "a brace too many": (hermes("f", '{"a": 1}}'), "", [("f", '{"a": 1}')]),
    "a brace too few": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>', "", [("f", '{"a": 1}')]),
    "cut": ('<tool_call>\n{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut in the last tag": (hermes("f", "{}")[:-3], "", [("f", "{}")]),
    "no last tag": (hermes("f", "{}")[:-12] + hermes("g", "{}"), "", [("f", "{}"), ("g", "{}")]),
    "two first tags": ("<tool_call>" + hermes("f", "{}"), "<tool_call>", [("f", "{}")]),
    "a brace between quotes": (hermes("f", r'{"a": "\"}\" \\"}'), "", [("f", r'{"a": "\"}\" \\"}')]),
    "a tag in a string": (hermes("f", '{"a": "</tool_call>"}'), "", [("f", '{"a": "</tool_call>"}')]),
    # What is no call is text.
    "no JSON": ("<tool_call>\nget_weather()\n</tool_call>", "<tool_call>\nget_weather()\n</tool_call>", []),
    "no name": ('<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    "a name with spaces": (hermes("a b", "{}"), hermes("a b", "{}"), []),
    "arguments of a list": (hermes("f", "[1]"), hermes("f", "[1]"), []),
    "broken before the name": ('<tool_call>{"x: 1}', '<tool_call>{"x: 1}', []),
    "a tag alone": ("a <tool_call>", "a <tool_call>", []),
    "the other format": (xml("f"), xml("f"), []),
    "a call behind what is none": ("<tool_call>x " + hermes("f", "{}"), "<tool_call>x", [("f", "{}")]),
}
CITY = '{"city": "Bern"}'
READ_QWEN_XML = {
    "one": (xml("get_weather", city="Bern"), "", [("get_weather", CITY)]),
    "none": (xml("now"), "", [("now", "{}")]),
    "behind text": (f"Well.\n\n{xml('now')}\n", "Well.", [("now", "{}")]),
    "two": (xml("now") + "\n" + xml("get_weather", city="Bern"), "", [("now", "{}"), ("get_weather", CITY)]),
    "types": (
        xml("get_weather", city="1\n2", days=" 3", exact="True", tags='["a"]', unit="None", note="null"),
        "",
        [("get_weather", '{"city": "1\\n2", "days": 3, "exact": true, "tags": ["a"], "unit": null, "note": null}')],
    ),
    "not of the type": (xml("get_weather", days="many"), "", [("get_weather", '{"days": "many"}')]),
    "of no type": (xml("any-1", a="[1]", b="x", c="1.5"), "", [("any-1", '{"a": [1], "b": "x", "c": 1.5}')]),
    "empty": (xml("get_weather", city="", note=""), "", [("get_weather", '{"city": "", "note": ""}')]),
    "letters": (xml("get_weather", city='"\\ é\n'), "", [("get_weather", '{"city": "\\"\\\\ é\\n"}')]),
    "in one line": (
        "<tool_call><function=get_weather><parameter=city>Bern</parameter></function></tool_call>",
        "",
        [("get_weather", CITY)],
    ),
    "without the first tag": ("<function=now>\n</function>\n</tool_call>", "", [("now", "{}")]),
    "without the end of the function": ("<tool_call>\n<function=now>\n</tool_call>", "", [("now", "{}")]),
    "no last tag": ("<tool_call>\n<function=now>\n</function>\n" + xml("now"), "", [("now", "{}"), ("now", "{}")]),
    "no last tags": ("<function=now>\n" + xml("now"), "", [("now", "{}"), ("now", "{}")]),
    "two first tags": ("<tool_call>" + xml("now"), "<tool_call>", [("now", "{}")]),
    "of an unknown tool": (xml("what", a="1"), "", [("what", '{"a": 1}')]),
    "cut in a text": (xml("get_weather", city="Bern")[:54], "", [("get_weather", '{"city": "Be')]),
    "text inside": (
        "<tool_call>\n<function=now>\n{}\n</function>\n</tool_call>",
        "{}\n</function>\n</tool_call>",
        [("now", "{}")],
    ),
    # What is no call is text.
    "no function": ("<tool_call>\nnow()\n</tool_call>", "<tool_call>\nnow()\n</tool_call>", []),
    "a name with spaces": ("<tool_call><function=a b>", "<tool_call><function=a b>", []),
    "the other format": (hermes("f", "{}"), hermes("f", "{}"), []),
}
READ = [("hermes", case, *it) for case, it in READ_HERMES.items()]
READ += [("qwen-xml", case, *it) for case, it in READ_QWEN_XML.items()]


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [pytest.param(name, *rest, id=f"{name}-{case}") for name, case, *rest in READ],
)
def test_a_reply_is_taken_apart(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, text) == (content, calls)
    assert assembled(pieces_of(text, syntax(name))) == ("", content, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_what_looks_like_a_thought_may_be_a_call(name: str) -> None:
    call = hermes("now", "{}") if name == "hermes" else xml("now")
    assert read(name, call, has_thought=True) == read(name, f"\n{call}", has_thought=True) == ("", [("now", "{}")])


def test_without_tools_a_reply_is_text() -> None:
    assert read(None, f" {hermes('f', '{}')}\n") == (f" {hermes('f', '{}')}\n", [])


def test_a_second_call_is_text_where_one_is_allowed() -> None:
    for name, first, second in (("hermes", hermes("f", "{}"), hermes("g", "{}")), ("qwen-xml", xml("now"), xml("x"))):
        content, calls = read(name, f"{first}\n{second}", max_calls=1)
        assert (content, len(calls)) == (second, 1)


WORDS = [
    *('<tool_call>', "</tool_call>", "\n", " ", "{", "}", '"name"', '"arguments"', ":", ",", '"', "f", "\\", "[", "]"),
    *("<function=", "f>", ">", "</function>", "<parameter=", "city", "</parameter>", "5", "<think>", "</think>"),
    *('{"name": "f", "arguments": {"a": "b"}}', "<function=get_weather>\n<parameter=city>\nBern\n", "<", "é", "None"),
]  # fmt: skip


def test_a_message_is_the_same_wherever_its_text_is_split() -> None:
    chance = random.Random(0)
    num_calls = 0
    for _ in range(1500):
        text = "".join(chance.choices(WORDS, k=chance.randint(1, 30)))
        text = "</think><tool_call>" + text if chance.random() < 0.5 else text
        of = syntax(
            chance.choice([None, "hermes", "qwen-xml"]),
            has_thought=chance.random() < 0.5,
            begins_in_thought=chance.random() < 0.5,
            max_calls=chance.choice([None, 1]),
        )
        whole = assembled(pieces_of([text], of))
        num_calls += len(whole[2])
        begin, end = sorted(chance.choices(range(len(text) + 1), k=2))
        assert assembled(pieces_of([text[:begin], text[begin:end], text[end:]], of)) == whole
        assert assembled(pieces_of(text, of)) == whole
    assert num_calls > 200


@pytest.mark.parametrize("name", FORMATS)
def test_only_what_may_become_a_tag_is_held_back(name: str) -> None:
    value = "a long text " * 20
    call = hermes("get_weather", json.dumps({"city": value})) if name == "hermes" else xml("get_weather", city=value)
    parser = ReplyParser(syntax(name))
    text, given = f"Well, {value}.\n{call}", ""
    tag = len("\n</parameter>")
    for i, letter in enumerate(text):
        given += "".join(getattr(piece, "text", "") for piece, _ in parser.push(letter))
        if i < len(text) - len(call):
            assert len(given) >= len(text[: i + 1].rstrip()) - tag
        elif value in text[i:]:
            continue  # the head of the call
        elif i < text.rindex(value) + len(value):
            assert len(given) > i - 100
    assert given.count(value.strip()) == 2


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"type": "number"}, {"integer", "number"}),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"const": True}, {"boolean"}),
        ({"$ref": "#/$defs/loop"}, {"string"}),
        ({"allOf": [{"type": ["string", "null"]}, {"type": "string"}]}, {"string"}),
        ({"oneOf": [{"type": "array"}, {"$ref": "#/$defs/absent"}]}, None),
        ({"type": 7}, None),
        (True, None),
    ],
)
def test_types_of_a_parameter(schema: object, types: set[str] | None) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}], "type": "string"}
    found = Parameters({"properties": {"a": schema}, "$defs": {"loop": loop}}).types("a")
    assert found == (types or found)
    assert len(found) == len(types) if types else len(found) >= 1


CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Zü\\"rich", "days": 3, "tags": ["<b>"], "note": null}'},
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call_1", "content": '{"t": 5}'}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL, CALL | {"id": "call_2"}]},
    RESULT,
    RESULT | {"tool_call_id": "call_2", "name": "get_weather"},
    {"role": "assistant", "content": "5 degrees"},
    USER,
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_rendered_as_transformers_renders_it(name: str, tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])

    def as_transformers_has_it(message: dict[str, Any]) -> dict[str, Any]:
        calls = [
            call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
            for call in message.get("tool_calls", [])
        ]
        return message | {"content": message["content"] or ""} | ({"tool_calls": calls} if calls else {})

    messages = [as_transformers_has_it(message) for message in CONVERSATION]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate(tmp_path)
    for tools in ([WEATHER, NOW], []):
        want = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        got = template.render(
            [Message(**message) for message in CONVERSATION],
            {"enable_thinking": True},
            [Tool.model_validate(tool) for tool in tools],
        )
        assert got == want
        assert (json.dumps(WEATHER, ensure_ascii=False) in got) == bool(tools)
    assert template.call_format() == name


def test_a_template_for_tools_is_taken_with_tools(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": HERMES}]
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate(tmp_path)
    assert template.render([Message(**USER)]) == tokenizer.apply_chat_template([USER], tokenize=False) == "plain"
    want = tokenizer.apply_chat_template([USER], tools=[NOW], tokenize=False, add_generation_prompt=True)
    assert template.render([Message(**USER)], None, [Tool.model_validate(NOW)]) == want


def test_arguments_that_are_no_object_go_back_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].tool_calls[0].function.arguments is string }}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for arguments, is_text in (('{"a": ', "True"), ("[1]", "True"), ("{}", "False"), ("", "False")):
        call = CALL | {"function": {"name": "f", "arguments": arguments}}
        message = Message.model_validate({"role": "assistant", "tool_calls": [call]})
        assert ChatTemplate(tmp_path).render([message]) == is_text


@pytest.fixture(scope="module", params=TEMPLATES)
def scripted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any, str]]:
    """The name of a format, and a server of it with its engine."""
    with live_scripted(tmp_path_factory.mktemp("tools"), TEMPLATES[request.param]) as (engine, url):
        yield request.param, engine, url


def calls_of(name: str, **values: str) -> str:
    return xml("get_weather", **values) if name == "qwen-xml" else hermes("get_weather", json.dumps(values))


def test_openai_s_client_reads_calls_and_answers_them(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    engine.replies = ["Let me see.\n" + calls_of(name, city="Bern", note="né") + "\n" + calls_of(name, city="Genf")]
    with openai_client(url) as client:
        answer = client.chat.completions.create(**ASK, tool_choice="auto")
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        first, second = choice.message.tool_calls or []
        assert (first.type, first.function.name) == ("function", "get_weather")
        assert json.loads(first.function.arguments) == {"city": "Bern", "note": "né"}
        assert json.loads(second.function.arguments) == {"city": "Genf"}
        assert first.id != second.id
        engine.replies = ["Nice."]
        results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in (first, second)]
        messages: Any = [USER, choice.message, *results]
        last = client.chat.completions.create(**ASK | {"messages": messages})
        assert (last.choices[0].message.content, last.choices[0].finish_reason) == ("Nice.", "stop")
        assert last.choices[0].message.tool_calls is None
    assert engine.prompts[-1].count("<tool_response>\n5\n</tool_response>") == 2
    assert "<tools>" in engine.prompts[-1]


def streamed(chunks: Iterable[Any]) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Content, calls, and the reasons of the end."""
    content, calls, reasons = "", [], []
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for part in choice.delta.tool_calls or []:
            if part.id is not None:
                assert (part.type, part.function.arguments, part.index) == ("function", "", len(calls))
                calls.append({"name": part.function.name, "parts": []})
            else:
                assert part.function.name is None
                calls[part.index]["parts"].append(part.function.arguments)
    return content, calls, reasons


def test_a_stream_brings_the_name_first_and_the_arguments_in_pieces(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    text = "a place far away, behind the mountains"
    engine.replies = ["Let me see.\n" + calls_of(name, city=text) + "\n" + calls_of(name, city="Genf")]
    with openai_client(url) as client:
        content, calls, reasons = streamed(client.chat.completions.create(**ASK, stream=True))
        assert (content, reasons) == ("Let me see.", ["tool_calls"])
        assert [json.loads("".join(call["parts"])) for call in calls] == [{"city": text}, {"city": "Genf"}]
        assert len(calls[0]["parts"]) > 8
        assert all(calls[0]["parts"])
        # Also by what the client itself makes of a stream.
        with client.chat.completions.stream(**ASK) as stream:
            (choice,) = stream.get_final_completion().choices
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls or []] == [text, "Genf"]


def test_answers_are_as_described(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    engine.replies = [f"<think>Hm.</think>Well. {calls_of(name, city='Bern')}"]
    answer = post(url, ASK, "/v1/chat/completions")
    found = ChatCompletionResponse.model_validate_json(answer.content, strict=True)
    assert found.choices[0].message.tool_calls
    assert found.choices[0].message.reasoning_content
    events = post(url, ASK | {"stream": True}, "/v1/chat/completions").text.split("data: ")[1:-1]
    chunks = [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]
    assert any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    assert any(chunk.choices[0].delta.reasoning_content for chunk in chunks)


def test_choices_call_each_for_itself(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    engine.replies = ["No need.", calls_of(name, city="Bern")]
    with openai_client(url) as client:
        plain, calling = client.chat.completions.create(**ASK, n=2).choices
    assert (plain.finish_reason, plain.message.content, plain.message.tool_calls) == ("stop", "No need.", None)
    assert (calling.finish_reason, calling.message.content) == ("tool_calls", None)


def test_every_token_s_logprob_is_told_once_and_in_order(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    reply = "Let me see. <tool " + calls_of(name, city="Bern") + " <tool_call> x"
    engine.replies = [reply]
    with openai_client(url) as client:
        ask = {**ASK, "logprobs": True, "temperature": 0}
        (choice,) = client.chat.completions.create(**ask).choices
        chunks = list(client.chat.completions.create(**ask, stream=True))
    told = [[part.logprob for part in chunk.choices[0].logprobs.content] for chunk in chunks[1:]]
    want = [part.logprob for part in choice.logprobs.content]
    assert [logprob for part in told for logprob in part] == want
    assert len(want) == len(TOKENIZER.encode(reply).ids)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert choice.message.content == "Let me see. <tool <tool_call> x"


def test_a_cut_call_says_so(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    reply = calls_of(name, city="Bern, the capital of Switzerland")
    engine.replies = [reply]
    with openai_client(url) as client:
        most = len(TOKENIZER.encode(reply[: reply.index("capital")]).ids)
        (choice,) = client.chat.completions.create(**ASK, max_completion_tokens=most).choices
        assert choice.finish_reason == "length"
        (call,) = choice.message.tool_calls or []
        assert call.function.arguments.startswith('{"city": "Bern, the')
        assert "Switz" not in call.function.arguments
        # A stop string is one of the text, tags and all.
        (choice,) = client.chat.completions.create(**ASK, stop=["</tool_call>"]).choices
        assert (choice.finish_reason, len(choice.message.tool_calls or [])) == ("tool_calls", 1)


def test_without_a_choice_nothing_is_called(scripted: tuple[str, ScriptedEngine, str]) -> None:
    name, engine, url = scripted
    reply = calls_of(name, city="Bern")
    engine.replies = [reply]
    with openai_client(url) as client:
        for options in ({**ASK, "tool_choice": "none"}, {**ASK, "tools": []}):
            (choice,) = client.chat.completions.create(**options).choices
            assert (choice.finish_reason, choice.message.content) == ("stop", reply)
            assert "<tools>" not in engine.prompts[-1]
        (choice,) = client.chat.completions.create(**ASK, parallel_tool_calls=False).choices
        assert len(choice.message.tool_calls or []) == 1


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].type"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [NOW, {"type": "custom", "custom": {"name": "a"}}]}, "unknown_parameter", "tools[1].custom"),
        ({"tools": [{"type": "retrieval", "function": {"name": "a"}}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [NOW, WEATHER, NOW]}, "invalid_value", "tools[2].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "invalid_type",
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "invalid_value",
            "tools[0].function.parameters",
        ),
        ({"tools": [NOW], "tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "then"}}},
            "invalid_value",
            "tool_choice.function.name",
        ),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "missing_required_parameter", "tool_choice.function"),
        ({"parallel_tool_calls": "no"}, "invalid_type", "parallel_tool_calls"),
        ({"functions": [{"name": "a"}]}, "unsupported_parameter", "functions"),
        ({"function_call": {"name": "a"}}, "unsupported_parameter", "function_call"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "invalid_value", "messages[0].tool_calls"),
        ({"messages": [USER | {"reasoning_content": "a"}]}, "invalid_value", "messages[0].reasoning_content"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "invalid_value", "messages[0].tool_call_id"),
        (
            {"messages": [USER, {"role": "tool", "content": "a"}]},
            "missing_required_parameter",
            "messages[1].tool_call_id",
        ),
        ({"messages": [USER, RESULT]}, "invalid_value", "messages[1].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "invalid_type", "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": ""}]}]},
            "invalid_value",
            "messages[0].tool_calls[0].id",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "a", "arguments": {}}}]}]},
            "invalid_type",
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
    ids=lambda value: str(value)[:70] if isinstance(value, dict) else "",
)
def test_the_place_of_what_is_wrong_is_told(
    scripted: tuple[str, ScriptedEngine, str], change: dict[str, Any], code: str, param: str
) -> None:
    answer = post(scripted[2], CHAT | change, "/v1/chat/completions")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("template", "option", "words"),
    [
        ("{{ messages[0].content }}", "hermes", "takes no tools"),
        ("{{ tools|tojson }}", "auto", "--tool-call-format"),
        ("{{ tools|tojson }}", "hermes", ""),
        (QWEN_XML, "hermes", ""),
    ],
)
def test_the_format_is_the_template_s_or_the_option_s(template: str, option: str, words: str, tmp_path: Path) -> None:
    with live_scripted(tmp_path, template, tool_call_format=option) as (engine, url):
        engine.replies = [hermes("now", "{}")]
        answer = post(url, ASK, "/v1/chat/completions")
    if words:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert words in answer.json()["error"]["message"]
    else:
        assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"


def test_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in CHECKPOINT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{{ tools }}")
    apps: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda app, *_, **__: apps.append(app))
    command = ["serve", str(tmp_path), "--port", "0", "--tool-call-format", "qwen-xml", "--reasoning", "off"]
    assert CliRunner().invoke(cli_app, command).exit_code == 0
    assert len(apps) == 1
    assert CliRunner().invoke(cli_app, [*command[:-4], "--tool-call-format", "yaml"]).exit_code == 2


OF_GRAMMAR = llguidance.LLTokenizer(TOKENIZER.to_str())


def is_accepted(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(OF_GRAMMAR, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


GOOD_XML = xml("get_weather", city='Be"rn\nx', days="3", unit="null", tags='["a"]', zip="01234")
GOOD_HERMES = hermes("get_weather", '{"city": "Bern", "days": 3, "tags": ["a"]}')
BAD_XML = [
    xml("get_weather", city="B"),
    xml("get_weather", city="Bern</parameter>, the capital"),
    xml("get_weather", days="3"),
    xml("get_weather", city="Bern", days="many"),
    xml("get_weather", city="Bern", unit="K"),
    xml("get_weather", city="Bern", zip="0123"),
    xml("get_weather", city="Bern", more="x"),
    xml("then"),
]
BAD_HERMES = [hermes("get_weather", '{"days": 3}'), hermes("then", "{}"), hermes("now", '{"a": 1}')]
THEN_NOW = {"hermes": hermes("now", "{}"), "qwen-xml": xml("now")}
GOOD_CALLS = {"hermes": [GOOD_HERMES, hermes("any-1", '{"a": [1]}')], "qwen-xml": [GOOD_XML, xml("any-1", a="{}")]}
BAD_CALLS = {"hermes": BAD_HERMES, "qwen-xml": BAD_XML}


@pytest.mark.parametrize("name", FORMATS)
def test_the_grammar_accepts_valid_calls_alone(name: str) -> None:
    def accepts(text: str, choice: ToolChoice, *, parallel: bool = True, thought: str = "none") -> bool:
        grammar = tool_grammar(
            name,
            TOOLS,
            choice,
            is_parallel=parallel,
            has_thought=thought != "none",
            begins_in_thought=thought == "open",
        )
        accepted = is_accepted(grammar, text)
        if accepted:  # and the parser finds the same
            of = syntax(name, has_thought=thought != "none", begins_in_thought=thought == "open")
            for called, arguments in assembled(pieces_of([text], of))[2]:
                assert called in PARAMETERS
                assert isinstance(json.loads(arguments), dict)
        return accepted

    now, named = THEN_NOW[name], NamedToolChoice.model_validate({"type": "function", "function": {"name": "now"}})
    good, *others = GOOD_CALLS[name]
    for call in (good, now, *others):
        assert accepts(call, "required")
        assert accepts(f"{now}\n{call}", "required")
        assert not accepts(f"{now}\n{call}", "required", parallel=False)
        assert accepts(f"Well.\n{call}", "auto", parallel=False)
    for call in BAD_CALLS[name]:
        assert not accepts(call, "required")
        assert not accepts(f"Well.\n{call}", "auto")
    for text in ("", "Hello", f"{now} Hello"):
        assert not accepts(text, "required")
    assert accepts("Hello", "auto")
    assert accepts(now, named)
    assert not accepts(good, named)
    for thought in ("open", "optional"):
        begin = "" if thought == "open" else "<think>\n"
        assert accepts(f"{begin}a < b\n</think>\n\n{now}", "required", thought=thought)
        assert accepts(f"{begin}Hm.</think>Hello {now}", "auto", thought=thought)
        assert accepts(now, "required", thought=thought) == (thought == "optional")
