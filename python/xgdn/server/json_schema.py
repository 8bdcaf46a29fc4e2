# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of clients: which keywords are enforced, and what a schema is to the grammar engine."""

from collections.abc import Iterator, Mapping
from typing import Any

from xgdn.server.api_error import bad_request

JsonSchema = Mapping[str, Any]
Place = tuple[str | int, ...]

ENFORCED = frozenset(
    "type const enum anyOf oneOf allOf $ref properties required additionalProperties patternProperties minProperties "
    "maxProperties items prefixItems additionalItems minItems maxItems minLength maxLength pattern format minimum "
    "maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)
# They say something about values and allow all; so do those that begin with x-.
ANNOTATIONS = frozenset(
    "$schema $id id $anchor $defs definitions $comment title description default example examples deprecated readOnly "
    "writeOnly contentEncoding contentMediaType contentSchema discriminator externalDocs".split()
)
_ONE = ("items", "additionalItems", "additionalProperties")
_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_OPTIONS = "x-guidance"  # the engine's own key

# Whitespace is bounded, so that no text consists of blanks to its end.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# Without \uXXXX, which would be a second way to write the name of a property that the schema restricts.
_ESCAPES = 'nrbtf\\"'


def path(param: str, place: Place) -> str:
    """Return a place in a parameter's value as errors name it: `a.items[1].b`."""
    return param + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)


def subschemas(schema: object, place: Place = ()) -> Iterator[tuple[Place, JsonSchema]]:
    """Yield a schema and all schemas in it, with their places."""
    if not isinstance(schema, Mapping):
        return
    yield place, schema
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, Mapping):
            parts = [((keyword, name), part) for name, part in value.items()]
        elif keyword in _LIST and isinstance(value, list):
            parts = [((keyword, i), part) for i, part in enumerate(value)]
        else:
            parts = [((keyword,), value)] if keyword in _ONE else []
        for more, part in parts:
            yield from subschemas(part, (*place, *more))


def check_keywords(schema: object, param: str) -> None:
    """Raise ApiError for a keyword that would not be enforced, anywhere in the schema."""
    for place, part in subschemas(schema):
        for keyword in part:
            is_known = keyword in ENFORCED or keyword in ANNOTATIONS or keyword.startswith("x-")
            if not is_known or keyword == _OPTIONS:
                where = path(param, (*place, keyword))
                message = f"'{where}': the keyword '{keyword}' of JSON Schema is not supported."
                raise bad_request(message, where, "unsupported_parameter")
        least = part.get("minProperties")
        required = part.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        # The engine counts properties by text, in which a name that is not in 'properties' may occur twice.
        if isinstance(least, int) and least > num_required + 1:
            where = path(param, (*place, "minProperties"))
            message = f"'{where}': expected at most one more than 'required' has, {num_required + 1}, got {least}."
            raise bad_request(message, where, "unsupported_parameter")


def engine_schema(schema: object, *, whitespace_pattern: str | None = None, is_compact: bool = False) -> JsonSchema:
    """Return the schema with the engine's options: regular expression of whitespace between tokens, or none at all.

    Objects, true, and false are schemas; anything else is for the engine to refuse.
    """
    options: dict[str, Any] = {"json_allowed_escapes": _ESCAPES, "whitespace_flexible": False}
    if not is_compact:
        options["whitespace_pattern"] = _WHITESPACE if whitespace_pattern is None else whitespace_pattern
    contents = schema if isinstance(schema, Mapping) else {} if schema is True else {"allOf": [schema]}
    return {**contents, _OPTIONS: options}
