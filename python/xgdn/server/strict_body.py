# SPDX-License-Identifier: Apache-2.0
"""The base of what a request's body consists of: strict types, no unknown fields."""

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

UNKNOWN = "unknown_field"
MISSING = "missing_field"
INVALID = "invalid_field"
INVALID_TYPE = "invalid_field_type"
UNSUPPORTED = "unsupported_field"
OF_A_FIELD = frozenset([UNKNOWN, MISSING, INVALID, INVALID_TYPE])


class StrictBody(BaseModel):
    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _know_every_field(cls, document: object) -> object:
        if isinstance(document, dict) and not document.keys() <= cls.model_fields.keys():
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in document:
                if key not in known:
                    refuse_field(key, "unknown field", UNKNOWN)
        return document


def refuse_field(name: str, reason: str, kind: str = INVALID) -> NoReturn:
    """Fail the validation of a body because of one of its fields, which may be absent."""
    raise PydanticCustomError(kind, "{reason}", {"field": name, "reason": reason})


class Neutral:
    """Marks a field that is refused except for some values, which ask for what is done anyway."""

    def __init__(self, *values: object) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, _: Any, __: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _: Any, __: Any) -> dict[str, Any]:
        return {"enum": [*self.values], "description": "Not supported: other values are refused."}

    def _check(self, value: object) -> object:
        if not any(value == neutral and type(value) is type(neutral) for neutral in self.values):
            raise PydanticCustomError(UNSUPPORTED, "not supported")
        return value
