# SPDX-License-Identifier: Apache-2.0
"""What the JSON schema of a tool says about its parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

ALL_TYPES = frozenset(["string", "boolean", "integer", "number", "object", "array", "null"])
_DEFINITIONS = ("$defs", "definitions")
_NAMES: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}


class Parameters:
    """The properties of a tool's JSON schema, which may be absent or say nothing."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        properties = schema.get("properties")
        required = schema.get("required")
        self.properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self.required = frozenset(filter(_is_text, required)) if isinstance(required, list) else frozenset()
        self.definitions = {key: schema[key] for key in _DEFINITIONS if isinstance(schema.get(key), Mapping)}
        self._referenced: dict[str, frozenset[str]] = {}
        self._types = {name: self._types_of(it) for name, it in self.properties.items()}

    def types(self, name: str) -> frozenset[str]:
        """Return the types that the value of a parameter may have; all of them where the schema does not tell."""
        return self._types.get(name, ALL_TYPES)

    def _types_of(self, schema: object) -> frozenset[str]:
        if not isinstance(schema, Mapping):
            return ALL_TYPES
        types = ALL_TYPES
        if isinstance(schema.get("$ref"), str):
            types &= self._types_of_reference(schema["$ref"])
        if "type" in schema:
            types &= _named_types(schema["type"])
        if "const" in schema:
            types &= {type_of(schema["const"])}
        if isinstance(schema.get("enum"), list):
            types &= frozenset(map(type_of, schema["enum"]))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                types &= _union(map(self._types_of, schema[key]))
        for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else []:
            types &= self._types_of(part)
        return types or ALL_TYPES

    def _types_of_reference(self, reference: str) -> frozenset[str]:
        if reference not in self._referenced:
            self._referenced[reference] = ALL_TYPES  # of a schema that refers to itself
            kind, _, name = reference.removeprefix("#/").partition("/")
            self._referenced[reference] = self._types_of(self.definitions.get(kind, {}).get(name))
        return self._referenced[reference]


def type_of(value: object) -> str:
    """Return JSON schema's name for the type of a value."""
    if isinstance(value, float) and value.is_integer():
        return "integer"
    return _NAMES[type(value)]


def _named_types(named: object) -> frozenset[str]:
    types = frozenset(filter(_is_text, named)) if isinstance(named, list) else frozenset([str(named)])
    return types | {"integer"} if "number" in types else types


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def _is_text(value: object) -> bool:
    return isinstance(value, str)
