# SPDX-License-Identifier: Apache-2.0
"""The formats in which models write calls of tools.

A format reads a call in two parts. The first, up to the name, decides whether it is one: what is not becomes text. From
there on the call is given to the client as it is written, so what goes wrong later stays in the arguments.
"""

import json
import re
import string
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import from_json

from xgdn.server.text_reader import TextReader, Waiting
from xgdn.server.tool_parameters import Parameters, type_of

BEGIN, END = "<tool_call>", "</tool_call>"
NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "_-")
MAX_NAME_LENGTH = 64
_BRACES, _MAX_BRACES = frozenset("}"), 4  # behind the arguments; models get their number wrong now and then


@dataclass(frozen=True)
class CallStart:
    """The name of a call, and what has been read of its arguments."""

    name: str
    arguments: str = ""
    is_complete: bool = False  # of the arguments


class ToolCallFormat(Protocol):
    """Reads calls. `markers` are the texts with which one begins."""

    markers: tuple[str, ...]

    def read_start(self, reader: TextReader, marker: str) -> Waiting[CallStart | str]:
        """Return the start of the call behind a marker; a text, which has been read, if it is none."""

    def read_arguments(self, reader: TextReader, start: CallStart) -> Generator[str | None, None, str]:
        """Yield the rest of the arguments, a JSON object; return text that was read and is no part of the call."""


class HermesFormat:
    """JSON between two tags, as in Qwen3 and Qwen3-Next."""

    markers: tuple[str, ...] = (BEGIN,)

    def read_start(self, reader: TextReader, marker: str) -> Waiting[CallStart | str]:
        reader.record(marker)
        if (yield from reader.words("{", '"name"', ":", '"')):
            name = yield from reader.run(NAME_LETTERS, MAX_NAME_LENGTH)
            if name and (yield from reader.word('"')) and (yield from reader.words(",", '"arguments"', ":", "{")):
                reader.recorded()
                return CallStart(name, "{")
        return (yield from self._other_order(reader, reader.recorded()))

    def read_arguments(self, reader: TextReader, start: CallStart) -> Generator[str | None, None, str]:
        if not start.is_complete:
            yield from reader.scan(_ObjectEnd(start.arguments).find, _one)
        yield from reader.blanks()
        yield from reader.run(_BRACES, _MAX_BRACES)
        reader.record()
        return (yield from _read_end(reader))

    def _other_order(self, reader: TextReader, text: str) -> Waiting[CallStart | str]:
        """Read the object to its end before deciding, since the name is not where it usually is."""
        beginning = text.removeprefix(BEGIN)
        if not beginning.lstrip().startswith("{"):
            return text
        reader.record(beginning)
        yield from reader.scan(_ObjectEnd(beginning).find, _nothing)
        written = reader.recorded()
        try:
            call = from_json(written, allow_inf_nan=False)
        except ValueError:
            return BEGIN + written
        name, arguments = call.get("name"), call.get("arguments", {})
        if not is_name(name) or not isinstance(arguments, dict):
            return BEGIN + written
        return CallStart(name, json.dumps(arguments, ensure_ascii=False), is_complete=True)


class QwenXmlFormat:
    """Tags for the function and for each parameter, as in Qwen3-Coder and Qwen3.5.

    Args:
        parameters: the parameters of each tool, by its name, whose schemas say what the values are.
    """

    markers: tuple[str, ...] = (BEGIN, "<function=")  # the first tag is left out now and then

    def __init__(self, parameters: Mapping[str, Parameters]) -> None:
        self._parameters = parameters

    def read_start(self, reader: TextReader, marker: str) -> Waiting[CallStart | str]:
        reader.record(marker)
        if marker == "<function=" or (yield from reader.words("<function=")):
            name = yield from reader.run(NAME_LETTERS, MAX_NAME_LENGTH)
            if name and (yield from reader.word(">")):
                reader.recorded()
                return CallStart(name)
        return reader.recorded()

    def read_arguments(self, reader: TextReader, start: CallStart) -> Generator[str | None, None, str]:
        parameters = self._parameters.get(start.name, Parameters({}))
        separator = "{"
        while True:
            reader.record()
            yield from reader.blanks()
            tag = yield from reader.word("<parameter=", "</function>", END)
            if tag == "<parameter=":
                name, end = yield from reader.text_until(">", "\n")
                if end == ">":
                    yield f"{separator}{_json(name)}: "
                    separator = ", "
                    yield from self._read_value(reader, parameters.types(name))
                    continue
            text = reader.recorded()
            if reader.is_at_end and tag not in ("</function>", END):
                return ""  # the reply ends inside the call: so do the arguments
            yield "{}" if separator == "{" else "}"
            if tag == "</function>":
                reader.record()
                return (yield from _read_end(reader))
            return "" if tag == END else text

    def _read_value(self, reader: TextReader, types: frozenset[str]) -> Generator[str | None, None, None]:
        reader.recorded()
        if (yield from reader.peek()) == "\n":
            yield from reader.word("\n")
        ends = ("\n</parameter>", "</parameter>")
        if types == {"string"}:
            yield '"'
            if (yield from reader.until(ends, _json_letters)):
                yield '"'
        else:
            text, end = yield from reader.text_until(*ends)
            yield json_value(text, types) if end else text


def json_value(text: str, types: frozenset[str]) -> str:
    """Return a parameter's value as JSON: what it is if that is of one of the types, else a string."""
    words = {"True": "true", "False": "false", "None": "null"}  # templates write Python's
    written = words.get(text.strip(), text.strip())
    try:
        value = from_json(written, allow_inf_nan=False)
    except ValueError:
        return _json(text)
    return written if type_of(value) in types else _json(text)


def is_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and NAME_LETTERS.issuperset(name)


def _read_end(reader: TextReader) -> Waiting[str]:
    """Read the tag that ends a call; return what was recorded if another text follows."""
    if (yield from reader.words(END)) or reader.is_at_end:
        reader.recorded()
        return ""
    return reader.recorded()


class _ObjectEnd:
    """Finds the end of a JSON object whose beginning is known, bracket by bracket."""

    _outside = re.compile(r'[{}\[\]"<]')  # a tag cannot be inside, so it ends an object that lacks brackets
    _inside_string = re.compile(r'["\\]')

    def __init__(self, beginning: str) -> None:
        self._depth = 0
        self._is_inside_string = False
        self._is_escaped = False
        self.find(beginning, 0)

    def find(self, text: str, place: int) -> int | None:
        """Return where the object ends, if it does so behind `place`."""
        if self._is_escaped and place < len(text):
            self._is_escaped = False
            place += 1
        while found := (self._inside_string if self._is_inside_string else self._outside).search(text, place):
            place = found.end()
            letter = found[0]
            if letter == "\\":
                self._is_escaped = place == len(text)
                place += 1
            elif letter == '"':
                self._is_inside_string = not self._is_inside_string
            elif letter == "<":
                return found.start()
            else:
                self._depth += 1 if letter in "{[" else -1
                if self._depth == 0:
                    return place
        return None


def _one(text: str) -> Iterator[str]:
    if text:
        yield text


def _nothing(_: str) -> tuple[()]:
    return ()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _json_letters(text: str) -> Iterator[str]:
    if text:
        yield _json(text)[1:-1]


def format_of(template: str) -> str | None:
    """Return the name of the format that a chat template tells the model; None for another or none."""
    if BEGIN not in template:
        return None
    return "qwen-xml" if "<function=" in template else "hermes"


FORMATS: dict[str, Callable[[Mapping[str, Parameters]], ToolCallFormat]] = {
    "hermes": lambda _: HermesFormat(),
    "qwen-xml": QwenXmlFormat,
}
