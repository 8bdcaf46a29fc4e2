# SPDX-License-Identifier: Apache-2.0
"""Grammars, in llguidance's dialect of Lark, of replies whose calls of tools are valid."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from xgdn.server.json_schema import engine_schema
from xgdn.server.reply_parser import END_OF_THOUGHT, THOUGHT
from xgdn.server.tool_call_formats import BEGIN, END
from xgdn.server.tool_parameters import Parameters, type_of
from xgdn.server.tool_schemas import NamedToolChoice, Tool, ToolChoice

_LINE = "\n"
_END_OF_VALUE = "\n</parameter>\n"


def needs_grammar(tools: Sequence[Tool], choice: ToolChoice, *, is_parallel: bool) -> bool:
    """Return whether the client wants more than what a model does by itself."""
    return bool(tools) and (choice != "auto" or not is_parallel or any(tool.function.strict for tool in tools))


def tool_grammar(
    call_format: str,
    tools: Sequence[Tool],
    choice: ToolChoice,
    *,
    is_parallel: bool,
    has_thought: bool,
    begins_in_thought: bool,
) -> str:
    """Return the grammar of a reply: a thought if there may be one, then calls, or with "auto" a text or calls.

    Args:
        call_format: hermes or qwen-xml.
        choice: auto, required, or the tool to call.
        is_parallel: whether there may be several calls.
        has_thought: whether a thought may come first.
        begins_in_thought: whether it does, with its first tag in the prompt.
    """
    if isinstance(choice, NamedToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    calls = f"body (separator {_quoted(BEGIN)} body)*" if is_parallel else "body"
    rules = [f"reply: text | head {calls}" if choice == "auto" else f"reply: {_quoted(BEGIN)} {calls}"]
    if choice == "auto":
        rules += ["text: TEXT", f"head[lazy]: TEXT {_quoted(BEGIN)}"]
    if begins_in_thought:
        rules += ["start: thought BLANKS reply"]
    elif has_thought:
        rules += [f"start: reply | {_quoted(THOUGHT)} thought BLANKS reply"]
    else:
        rules += ["start: reply"]
    if has_thought:
        rules += [f"thought[lazy]: TEXT {_quoted(END_OF_THOUGHT)}", "BLANKS: /\\s{0,8}/"]
    rules += [f"body: {' | '.join(f'call_{i}' for i in range(len(tools)))}", f"separator: {_quoted(_LINE)}"]
    for i, tool in enumerate(tools):
        rules += (_hermes_call if call_format == "hermes" else _qwen_xml_call)(i, tool)
    return "\n".join([*rules, "TEXT: /(?s:.*)/", ""])


def _hermes_call(i: int, tool: Tool) -> Iterator[str]:
    head = f'\n{{"name": {_quoted(tool.function.name)}, "arguments": '
    yield f"call_{i}: {_quoted(head)} arguments_{i} {_quoted(f'}}{_LINE}{END}')}"
    yield f"arguments_{i}: %json {json.dumps(engine_schema(_object_schema(tool)))}"


def _object_schema(tool: Tool) -> dict[str, Any]:
    if tool.function.parameters is None:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object", **tool.function.parameters}


def _qwen_xml_call(i: int, tool: Tool) -> Iterator[str]:
    parameters = tool.parameters
    head, last = f"\n<function={tool.function.name}>\n", f"</function>\n{END}"
    names = [*parameters.properties, *sorted(parameters.required - parameters.properties.keys())]
    if names:
        used = " ".join(f"p_{i}_{k}" + ("" if name in parameters.required else "?") for k, name in enumerate(names))
    else:  # a schema without properties says nothing about them; no schema says that there are none
        used = "" if tool.function.parameters is None else f"any_{i}*"
        yield f'any_{i}: "<parameter=" /[^>\\n]+/ {_quoted(f">{_LINE}")} v_{i}'
        yield from _text_value(f"v_{i}")
    yield f"call_{i}: {_quoted(head)} {used} {_quoted(last)}"
    for k, name in enumerate(names):
        yield f"p_{i}_{k}: {_quoted(f'<parameter={name}>{_LINE}')} v_{i}_{k}"
        yield from _value(f"v_{i}_{k}", name, parameters)


def _value(rule: str, name: str, parameters: Parameters) -> Iterator[str]:
    """Yield the rules of a parameter's value with the tag behind it."""
    schema = parameters.properties.get(name)
    schema = schema if isinstance(schema, dict) else {}
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(allowed, list):
        words = [value if type_of(value) == "string" else json.dumps(value) for value in allowed]
        yield f"{rule}: {' | '.join(_quoted(word + _END_OF_VALUE) for word in words)}"
    elif "string" in parameters.types(name):
        yield from _text_value(rule, schema)
    else:
        yield f"{rule}: %json {json.dumps(engine_schema(schema | parameters.definitions))} {_quoted(_END_OF_VALUE)}"


def _text_value(rule: str, schema: dict[str, Any] | None = None) -> Iterator[str]:
    """Yield the rules of a text, which its end tag cannot be part of."""
    schema = schema or {}
    limits = ""
    if schema.get("type") == "string":
        least, most = (_length(schema.get(key)) for key in ("minLength", "maxLength"))
        if least or most:
            limits += f" & /(?s:.{{{least or 0},{most}}})/"
        if isinstance(schema.get("pattern"), str):
            limits += f" & /{_whole(schema['pattern'])}/"
    name = rule.upper()
    yield f"{rule}[lazy]: {name} {_quoted(_END_OF_VALUE)}"
    yield f"{name}: /(?s:.*)/ & ~/(?s:.*)<\\/parameter>(?s:.*)/{limits}"


def _length(limit: object) -> str:
    """Return a limit as regular expressions have it; none if it is no number."""
    return str(limit) if type(limit) is int and limit >= 0 else ""


def _whole(pattern: str) -> str:
    """Return the regular expression of all texts in which `pattern` is found."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    behind = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^")
    inner = inner if behind else inner.removesuffix("$")
    return f"{before}({inner}){behind}".replace("\\/", "/").replace("/", "\\/")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
