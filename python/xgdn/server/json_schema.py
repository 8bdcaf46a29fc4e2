# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of clients: which keywords are enforced, and what a schema is to the grammar engine."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xgdn.server.api_error import ApiError, bad_request

JsonSchema = Mapping[str, Any]
Place = tuple[str | int, ...]

_ONE = ("items", "additionalItems", "additionalProperties")
_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
ENFORCED = frozenset(
    [
        *("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref"),
        *("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    ]
)
# They say something about values and allow all; so do those that begin with x-.
_ANNOTATIONS = frozenset(
    [
        *("$schema", "$id", "id", "$anchor", "$defs", "definitions", "$comment", "title", "description", "default"),
        *("example", "examples", "deprecated", "readOnly", "writeOnly", "externalDocs", "discriminator"),
        *("contentEncoding", "contentMediaType", "contentSchema"),
    ]
)
_OPTIONS = "x-guidance"  # the engine's own key

# What those who print JSON put between two tokens: no text consists of blanks to its end.
_WHITESPACE = r"[ \t]{1,2}|[ \t]?\r?\n[ \t]{0,64}"
# Without \uXXXX, which would be a second way to write the name of a property that the schema restricts.
_ESCAPES = 'nrbtf\\"'
_NEEDS_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u")  # in JSON without escapes of what can do without


def path(param: str, place: Place) -> str:
    """Return a place in a parameter's value as errors name it: `a.items[1].b`."""
    return param + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)


def subschemas(schema: object, place: Place = ()) -> Iterator[tuple[Place, JsonSchema]]:
    """Yield a schema and all schemas in it, with their places."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for keyword, value in schema.items():
        parts: list[tuple[Place, object]] = []
        if keyword in _BY_NAME and isinstance(value, Mapping):
            parts = [((keyword, name), part) for name, part in value.items()]
        elif keyword in _LIST and isinstance(value, list):
            parts = [((keyword, i), part) for i, part in enumerate(value)]
        elif keyword in _ONE:
            parts = [((keyword,), value)]
        for more, part in parts:
            yield from subschemas(part, (*place, *more))


def check_keywords(schema: object, param: str) -> None:
    """Raise ApiError for a keyword that would not be enforced, anywhere in the schema."""
    for place, part in subschemas(schema):
        for keyword, value in part.items():
            where = path(param, (*place, keyword))
            is_known = keyword in ENFORCED or keyword in _ANNOTATIONS or keyword.startswith("x-")
            if not is_known or keyword == _OPTIONS:
                message = f"'{where}': the keyword '{keyword}' of JSON Schema is not supported."
                raise bad_request(message, where, "unsupported_parameter")
            if keyword in ("const", "enum") and _NEEDS_ESCAPE.search(json.dumps(value, ensure_ascii=False)):
                raise _unsupported(where, r"no control characters but \b, \f, \n, \r and \t")
            # The engine counts properties by text, in which a name that is not in 'properties' may occur twice.
            if keyword == "minProperties" and isinstance(value, int):
                required = part.get("required")
                most = 1 + (len(required) if isinstance(required, list) else 0)
                if value > most:
                    raise _unsupported(where, f"at most one more than 'required' has, {most}, got {value}")


def _unsupported(where: str, expected: str) -> ApiError:
    return bad_request(f"'{where}': expected {expected}.", where, "unsupported_parameter")


def engine_schema(schema: object, *, whitespace_pattern: str | None = None, is_compact: bool = False) -> JsonSchema:
    """Return the schema with the engine's options: regular expression of whitespace between tokens, or none at all.

    Objects, true, and false are schemas; anything else is for the engine to refuse.
    """
    options: dict[str, Any] = {"json_allowed_escapes": _ESCAPES, "whitespace_flexible": False}
    if not is_compact:
        options["whitespace_pattern"] = _WHITESPACE if whitespace_pattern is None else whitespace_pattern
    contents = schema if isinstance(schema, Mapping) else {} if schema is True else {"allOf": [schema]}
    return {**contents, _OPTIONS: options}
