# SPDX-License-Identifier: Apache-2.0
"""JSON schemas for tests and benchmarks of structured output: one case per keyword, and seeded random ones."""

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import validator_for

Schema = dict[str, Any]

_DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


@dataclass(frozen=True)
class KeywordCase:
    """A schema of one keyword, with a document that it admits and one that it forbids."""

    name: str
    schema: Schema
    good: str
    bad: str


def _case(name: str, schema: Schema, good: object, bad: object) -> KeywordCase:
    compact = [json.dumps(document, separators=(",", ":"), ensure_ascii=False) for document in (good, bad)]
    return KeywordCase(name, schema, *compact)


def _format_case(name: str, good: str, bad: str) -> KeywordCase:
    return _case(f"format {name}", {"type": "string", "format": name}, good, bad)


_INTEGER = {"type": "integer"}
_TWO = {"a": 1, "b": 1}

KEYWORDS = [
    _case("type", {"type": ["string", "null"]}, None, 1),
    _case("enum", {"enum": [1, "a", None]}, "a", 2),
    _case("const", {"const": {"a": 1}}, {"a": 1}, {"a": 2}),
    _case("anyOf", {"anyOf": [{"type": "string"}, _INTEGER]}, 1, None),
    _case("oneOf", {"oneOf": [{"type": "string"}, _INTEGER]}, 1, None),
    _case("oneOf, not disjoint", {"oneOf": [{"type": "number"}, _INTEGER]}, 1.5, 1),
    _case("allOf", {"allOf": [_INTEGER, {"minimum": 3}]}, 3, 2),
    _case("not", {"not": {"type": "string"}}, 1, "a"),
    _case("if, then, else", {"if": _INTEGER, "then": {"minimum": 3}, "else": {"type": "string"}}, 3, 1),
    _case("$ref", {"$defs": {"x": _INTEGER}, "$ref": "#/$defs/x"}, 3, "a"),
    _case("$anchor", {"$defs": {"x": {"$anchor": "y", **_INTEGER}}, "$ref": "#y"}, 3, "a"),
    _case("$dynamicRef", {"$defs": {"x": {"$dynamicAnchor": "y", **_INTEGER}}, "$dynamicRef": "#y"}, 3, "a"),
    _case("properties", {"type": "object", "properties": {"a": _INTEGER}}, {"a": 1}, {"a": "x"}),
    _case("required", {"type": "object", "required": ["a"]}, {"a": 1}, {"b": 1}),
    _case("additionalProperties", {"type": "object", "additionalProperties": _INTEGER}, {"a": 1}, {"a": "x"}),
    KeywordCase(
        "additionalProperties, escaped name",
        {"type": "object", "properties": {"a": _INTEGER}, "additionalProperties": {"type": "string"}},
        '{"b":"x"}',
        '{"\\u0061":"x"}',
    ),
    _case(
        "patternProperties",
        {"type": "object", "patternProperties": {"^a": _INTEGER}, "additionalProperties": False},
        {"ab": 1},
        {"b": 1},
    ),
    _case("propertyNames", {"type": "object", "propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
    _case("minProperties", {"type": "object", "minProperties": 2}, _TWO, {"a": 1}),
    KeywordCase("minProperties, name twice", {"type": "object", "minProperties": 2}, '{"a":1,"b":1}', '{"a":1,"a":1}'),
    _case("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, _TWO),
    _case("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}, _TWO, {"a": 1}),
    _case("dependentSchemas", {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, _TWO, {"a": 1}),
    _case("dependencies (draft 7)", {**_DRAFT_7, "type": "object", "dependencies": {"a": ["b"]}}, _TWO, {"a": 1}),
    _case(
        "unevaluatedProperties",
        {"type": "object", "properties": {"a": _INTEGER}, "unevaluatedProperties": False},
        {"a": 1},
        {"b": 1},
    ),
    _case("items", {"type": "array", "items": _INTEGER}, [1], ["a"]),
    _case("items, a list (draft 7)", {**_DRAFT_7, "type": "array", "items": [_INTEGER]}, [1], ["a"]),
    _case(
        "additionalItems (draft 7)",
        {**_DRAFT_7, "type": "array", "items": [_INTEGER], "additionalItems": False},
        [1],
        [1, 2],
    ),
    _case("prefixItems", {"type": "array", "prefixItems": [_INTEGER], "items": False}, [1], ["a"]),
    _case("minItems", {"type": "array", "minItems": 2}, [1, 2], [1]),
    _case("maxItems", {"type": "array", "maxItems": 1}, [1], [1, 2]),
    _case("uniqueItems", {"type": "array", "uniqueItems": True}, [1, 2], [1, 1]),
    _case("contains", {"type": "array", "contains": _INTEGER}, [1], ["a"]),
    _case("minContains", {"type": "array", "contains": _INTEGER, "minContains": 2}, [1, 1], [1]),
    _case("unevaluatedItems", {"type": "array", "prefixItems": [_INTEGER], "unevaluatedItems": False}, [1], [1, 2]),
    _case("minLength", {"type": "string", "minLength": 2}, "ab", "a"),
    _case("maxLength", {"type": "string", "maxLength": 2}, "ab", "abc"),
    _case("pattern", {"type": "string", "pattern": "^b+$"}, "bb", "abc"),
    _case("pattern, not anchored", {"type": "string", "pattern": "b"}, "abc", "ac"),
    _case("pattern, anchored in part", {"type": "string", "pattern": "^a|b$"}, "ax", "xa"),
    _case("pattern with maxLength", {"type": "string", "pattern": "^b+$", "maxLength": 3}, "bbb", "bbbb"),
    _case("pattern, look-ahead", {"type": "string", "pattern": "^(?=a)"}, "a", "b"),
    _format_case("date-time", "2020-01-01T00:00:00Z", "2020"),
    _format_case("date", "2020-02-28", "2020-13-01"),
    _format_case("time", "00:00:00Z", "24"),
    _format_case("duration", "P1D", "1D"),
    _format_case("email", "a@b.cd", "a"),
    _format_case("hostname", "a.b", "-"),
    _format_case("ipv4", "1.2.3.4", "1.2.3.400"),
    _format_case("ipv6", "::1", "1"),
    _format_case("uuid", "123e4567-e89b-12d3-a456-426614174000", "1"),
    _format_case("uri", "http://a.b", "1"),
    _format_case("uri-reference", "/a", "\\"),
    _format_case("json-pointer", "/a", "a"),
    _format_case("regex", "a", "("),
    _case("minimum", {**_INTEGER, "minimum": 2}, 2, 1),
    _case("maximum", {"type": "number", "maximum": 2.5}, 2.5, 2.6),
    _case("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 2}, 2.1, 2),
    _case("exclusiveMaximum", {**_INTEGER, "exclusiveMaximum": 2}, 1, 2),
    _case("multipleOf", {**_INTEGER, "multipleOf": 3}, 6, 7),
    _case("multipleOf, a fraction", {"type": "number", "multipleOf": 0.25}, 0.75, 0.3),
]

_NAMES = ["id", "name", "kind", "size", "tags", "note", "zip code", "größe", 'a"b', "x.y", "is_set", "日付"]
_PATTERNS = ["^[a-z]{2,6}$", "^[A-Z][0-9]{3}$", "^(red|green|blue)$", r"^\d{1,4}-\w{2}$", '^["\\\\/]{1,3}$', "^é+$"]
_FORMATS = ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]


class _Maker:
    """Random schemas whose answers are short: every string, array and map has a maximum, except in a few formats."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._definitions: dict[str, Schema] = {}

    def schema(self) -> Schema:
        self._definitions = {}
        schema = self._chance.choice([self._object, self._object, self._array, self._map, self._union, self._all_of])(3)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        leaves: list[Callable[[], Schema]] = [self._string, self._pattern, self._format, self._integer, self._number]
        leaves += [self._choice, lambda: {"type": self._chance.choice(["boolean", "null"])}]
        if depth == 0 or self._chance.random() < 0.5:
            return self._chance.choice(leaves)()
        branches = [self._object, self._array, self._tuple, self._map, self._union, self._all_of, self._reference]
        return self._chance.choice(branches)(depth - 1)

    def _string(self) -> Schema:
        least = self._chance.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self._chance.randint(0, 8)}

    def _pattern(self) -> Schema:
        schema = {"type": "string", "pattern": self._chance.choice(_PATTERNS)}
        return {**schema, "maxLength": 10} if self._chance.random() < 0.3 or "+" in schema["pattern"] else schema

    def _format(self) -> Schema:
        return {"type": "string", "format": self._chance.choice(_FORMATS)}

    def _integer(self) -> Schema:
        least = self._chance.randint(-1000, 1000)
        most = least + self._chance.randint(10, 5000)
        bounds = self._chance.choice(
            [
                {"minimum": least, "maximum": most},
                {"exclusiveMinimum": least, "exclusiveMaximum": most},
                {"minimum": least, "exclusiveMaximum": most, "multipleOf": self._chance.randint(2, 9)},
            ]
        )
        return {"type": "integer", **bounds}

    def _number(self) -> Schema:
        least = round(self._chance.uniform(-50, 50), 2)
        bounds: Schema = {"minimum": least, "exclusiveMaximum": round(least + self._chance.uniform(1, 100), 2)}
        return {"type": "number", **bounds, **self._chance.choice([{}, {"multipleOf": 0.25}, {"multipleOf": 0.1}])}

    def _choice(self) -> Schema:
        values: list[Any] = ["red", 'a "b"', "größe", "a\tb", 7, -0.5, True, None, [1, "x"], {"k": [None]}, []]
        if self._chance.random() < 0.3:
            return {"const": self._chance.choice(values)}
        return {"enum": self._chance.sample(values, self._chance.randint(1, 5))}

    def _names(self, count: int) -> list[str]:
        return self._chance.sample(_NAMES, count)

    def _object(self, depth: int) -> Schema:
        names = self._names(self._chance.randint(1, 4))
        schema: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        schema["required"] = self._chance.sample(names, self._chance.randint(0, len(names)))
        return {**schema, "additionalProperties": False}

    def _map(self, depth: int) -> Schema:
        schema: Schema = {"type": "object", "maxProperties": self._chance.randint(1, 3)}
        if self._chance.random() < 0.5:
            schema |= {"minProperties": 1}
        if self._chance.random() < 0.5:
            return {**schema, "additionalProperties": self._any(depth)}
        letters = self._chance.sample(string.ascii_lowercase, 2)
        patterns = {f"^{letter}_[a-z]{{1,4}}$": self._any(depth) for letter in letters}
        return {**schema, "patternProperties": patterns, "additionalProperties": False}

    def _array(self, depth: int) -> Schema:
        least = self._chance.randint(0, 2)
        most = least + self._chance.randint(0, 2)
        return {"type": "array", "items": self._any(depth), "minItems": least, "maxItems": most}

    def _tuple(self, depth: int) -> Schema:
        prefix = [self._any(depth) for _ in range(self._chance.randint(1, 3))]
        rest = self._chance.choice([False, self._any(0)])
        return {"type": "array", "prefixItems": prefix, "items": rest, "minItems": 1, "maxItems": len(prefix) + 1}

    def _union(self, depth: int) -> Schema:
        if self._chance.random() < 0.5:
            return {"anyOf": [self._any(depth) for _ in range(self._chance.randint(2, 3))]}
        kinds = self._chance.sample(["circle", "square", "line"], 2)
        options = []
        for kind in kinds:
            properties = {"kind": {"const": kind}, "size": self._any(depth)}
            options.append(
                {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}
            )
        return {"oneOf": options}

    def _all_of(self, depth: int) -> Schema:
        first, second = self._names(2)
        base = {"type": "object", "properties": {first: self._any(depth)}, "required": [first]}
        more = {"properties": {first: True, second: self._any(depth)}, "additionalProperties": False}
        return {"allOf": [base, more]}

    def _reference(self, depth: int) -> Schema:
        name = f"d{len(self._definitions)}"
        self._definitions[name] = {}  # takes the name
        if self._chance.random() < 0.3:  # a list that ends
            node = {"type": "object", "properties": {"value": self._any(0), "next": {"$ref": f"#/$defs/{name}"}}}
            self._definitions[name] = {**node, "required": ["value"], "additionalProperties": False}
        else:
            self._definitions[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}


def random_schemas(count: int, seed: int = 0) -> list[Schema]:
    """Return schemas that have short answers. Every keyword that they can have is in the first 300 of any seed."""
    chance = random.Random(seed)
    maker = _Maker(chance)
    schemas = [maker.schema() for _ in range(count)]
    # Lists of items are an older draft's.
    for i in range(9, count, 20):
        items = {"items": [_INTEGER, {"type": "boolean"}], "additionalItems": {"type": "null"}}
        schemas[i] = {**_DRAFT_7, "type": "array", **items, "minItems": 1, "maxItems": 3}
    return schemas


def keywords_of(schema: object) -> Iterator[str]:
    """Yield the keywords of a schema and of the schemas in it."""
    if isinstance(schema, list):
        for part in schema:
            yield from keywords_of(part)
    elif isinstance(schema, dict):
        for keyword, value in schema.items():
            yield keyword
            if keyword in ("properties", "patternProperties", "$defs"):
                for part in value.values():
                    yield from keywords_of(part)
            elif keyword not in ("const", "enum"):
                yield from keywords_of(value)


def invalid(schema: Schema, text: str) -> str:
    """Return why a text is no document of the schema, by another library than the one that made it; empty if it is one.

    Numbers are taken as they are written, and the formats that jsonschema does not check by itself are checked here.
    """
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = validator_for(exact, Draft202012Validator)
    try:
        validator(exact, format_checker=_FORMAT_CHECKER).validate(json.loads(text, parse_float=Decimal))
    except (ValueError, ValidationError) as error:
        return str(error)
    return ""


_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_FORMAT_PATTERNS = {
    "time": f"(?i:{_TIME})",
    "date-time": rf"(?i:\d{{4}}-\d\d-\d\dT{_TIME})",
    "duration": r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[\x21-\x7e]*",
}
_FORMAT_CHECKER = FormatChecker()
for _name, _pattern in _FORMAT_PATTERNS.items():
    _FORMAT_CHECKER.checks(_name)(
        lambda value, pattern=_pattern: not isinstance(value, str) or re.fullmatch(pattern, value, re.ASCII) is not None
    )
