# SPDX-License-Identifier: Apache-2.0
"""The fields of a request that restrict the text of its replies, and the grammar that they stand for."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import from_json

from xgdn.server.api_error import bad_request
from xgdn.server.grammar_compiler import CompiledGrammar, GrammarCompiler
from xgdn.server.reply_parser import ReplySyntax

_MAX_CHOICES = 4096
_FORMAT, _OUTPUTS = "response_format", "structured_outputs"
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # the older names
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
_REFUSED = ("structural_tag", "disable_additional_properties", "disable_fallback")  # vLLM's others


class StructuredOutputFields(BaseModel):
    """OpenAI's `response_format`, and vLLM's names for the same and more. At most one grammar may come of them."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


def structured_output(
    body: StructuredOutputFields, compiler: GrammarCompiler, syntax: ReplySyntax
) -> CompiledGrammar | None:
    """Return the grammar of the replies to a request, behind their thoughts; None: any text. Raises ApiError."""
    found = [*_of_response_format(body), *_of_structured_outputs(body), *_of_guided_fields(body)]
    if len(found) > 1:
        (first, *_), (second, *_) = found[:2]
        raise bad_request(f"'{second}': expected one grammar of the replies, got '{first}' beside it.", second)
    whitespace = _whitespace(body)
    if not found:
        if whitespace:
            param = next(iter(whitespace))
            raise bad_request(f"'{param}': expected a grammar of JSON with it.", param)
        return None
    ((param, kind, value),) = found
    if whitespace and kind != "json":
        raise bad_request(f"'{next(iter(whitespace))}': expected a grammar of JSON with it.", next(iter(whitespace)))
    if kind != "json":
        compile_kind: Callable[..., CompiledGrammar] = getattr(compiler, kind)
        return compile_kind(value, param, syntax=syntax)
    pattern = next((value for name, value in whitespace.items() if isinstance(value, str)), None)
    is_compact = any(value is True for value in whitespace.values())
    return compiler.json_schema(value, param, syntax=syntax, whitespace_pattern=pattern, is_compact=is_compact)


_Found = list[tuple[str, str, Any]]  # parameter, kind of grammar, its source


def _of_response_format(body: StructuredOutputFields) -> _Found:
    value = body.response_format
    if value is None:
        return []
    kind = _required(value, "type", _FORMAT)
    known = {"text": [], "json_object": [], "json_schema": ["json_schema"]}
    if not isinstance(kind, str) or kind not in known:
        param = f"{_FORMAT}.type"
        raise bad_request(f"'{param}': expected one of {', '.join(known)}, got {_shown(kind)}.", param)
    _know_fields(value, ["type", *known[kind]], _FORMAT)
    if kind == "text":
        return []
    if kind == "json_object":
        return [(_FORMAT, "json", {"type": "object"})]
    param = f"{_FORMAT}.json_schema"
    document = _required(value, "json_schema", _FORMAT)
    if not isinstance(document, Mapping):
        raise _wrong_type(param, "an object")
    _know_fields(document, ["name", "description", "schema", "strict"], param)
    for name, kinds, what in (
        ("name", str, "a string"),
        ("description", (str, type(None)), "a string"),
        ("strict", (bool, type(None)), "true or false"),  # the schema is enforced either way
    ):
        entry = _required(document, "name", param) if name == "name" else document.get(name)
        if not isinstance(entry, kinds):
            raise _wrong_type(f"{param}.{name}", what)
    return [(f"{param}.schema", "json", _schema(_required(document, "schema", param), f"{param}.schema"))]


def _of_structured_outputs(body: StructuredOutputFields) -> _Found:
    value = body.structured_outputs or {}
    _know_fields(value, [*_KINDS, *_OPTIONS, *_REFUSED], _OUTPUTS)
    for name in _REFUSED:
        if value.get(name):
            param = f"{_OUTPUTS}.{name}"
            raise bad_request(f"'{param}' is not supported.", param, "unsupported_parameter")
    found: _Found = []
    for kind in _KINDS:
        entry, param = value.get(kind), f"{_OUTPUTS}.{kind}"
        if kind == "json_object":
            if not isinstance(entry, bool | None):
                raise _wrong_type(param, "true or false")
            found += [(param, "json", {"type": "object"})] if entry else []
        elif entry is not None:
            found.append((param, kind, _source(kind, entry, param)))
    if body.structured_outputs is not None and not found:
        raise bad_request(f"'{_OUTPUTS}': expected one of {', '.join(_KINDS)}.", _OUTPUTS)
    return found


def _of_guided_fields(body: StructuredOutputFields) -> _Found:
    given = [(name, getattr(body, name)) for name in _GUIDED]
    kinds = [(name, name.removeprefix("guided_"), value) for name, value in given if value is not None]
    return [(name, kind, _source(kind, value, name)) for name, kind, value in kinds]


def _whitespace(body: StructuredOutputFields) -> dict[str, str | bool]:
    """Return the options of whitespace in JSON that are set, by parameter."""
    value = body.structured_outputs or {}
    pattern, is_disabled = (value.get(name) for name in _OPTIONS)
    if not isinstance(pattern, str | None):
        raise _wrong_type(f"{_OUTPUTS}.whitespace_pattern", "a string")
    if not isinstance(is_disabled, bool | None):
        raise _wrong_type(f"{_OUTPUTS}.disable_any_whitespace", "true or false")
    options = {f"{_OUTPUTS}.{name}": value.get(name) for name in _OPTIONS}
    options["guided_whitespace_pattern"] = body.guided_whitespace_pattern
    given = {param: option for param, option in options.items() if option is not None and option is not False}
    if len(given) > 1:
        first, second = list(given)[:2]
        raise bad_request(f"'{second}': expected one rule for whitespace, got '{first}' beside it.", second)
    return given


def _source(kind: str, value: object, param: str) -> object:
    """Return the checked source of a grammar."""
    if kind == "json":
        return _schema(value, param)
    if kind != "choice":
        if not isinstance(value, str):
            raise _wrong_type(param, "a string")
        return value
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise _wrong_type(param, "a list of strings")
    if not 1 <= len(value) <= _MAX_CHOICES:
        raise bad_request(f"'{param}': expected 1 to {_MAX_CHOICES} strings, got {len(value)}.", param)
    return value


def _schema(value: object, param: str) -> object:
    """Return a JSON schema, which may come as text."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise bad_request(f"'{param}': expected a JSON schema. {error}.", param) from None
    if not isinstance(value, Mapping | bool):
        raise _wrong_type(param, "a JSON schema")
    return value


def _required(document: Mapping[str, Any], name: str, param: str) -> Any:
    if document.get(name) is None:
        raise bad_request(f"'{param}.{name}' is required.", f"{param}.{name}", "missing_required_parameter")
    return document[name]


def _know_fields(document: Mapping[str, Any], names: list[str], param: str) -> None:
    for name in document:
        if name not in names:
            where = f"{param}.{name}"
            raise bad_request(f"Unrecognized request argument supplied: {where}.", where, "unknown_parameter")


def _wrong_type(param: str, what: str) -> Exception:
    return bad_request(f"'{param}': expected {what}.", param, "invalid_type")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
