# SPDX-License-Identifier: Apache-2.0
"""Tools in request bodies: what may be called, and the calls that messages carry."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import from_json

from xgdn.server.strict_body import StrictBody, refuse_field
from xgdn.server.tool_parameters import Parameters

_MAX_TOOLS = 1024


_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionDefinition(StrictBody):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of an object; None: no parameters
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_of_an_object(self) -> "FunctionDefinition":
        if self.parameters and self.parameters.get("type", "object") != "object":
            refuse_field("parameters", "expected the JSON schema of an object")
        return self


class Tool(StrictBody):
    """A function that the model may call. `document` is what the client sent, which the template gets."""

    type: Literal["function"]
    function: FunctionDefinition
    _document: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep_document(cls, document: Any, handler: ModelWrapValidatorHandler["Tool"]) -> "Tool":
        tool = handler(document)
        tool._document = document
        return tool

    @property
    def document(self) -> Mapping[str, Any]:
        return self._document

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters(self.function.parameters or {})


Tools = Annotated[list[Tool], Field(max_length=_MAX_TOOLS, fail_fast=True)]


class _ChosenFunction(StrictBody):
    name: str


class NamedToolChoice(StrictBody):
    type: Literal["function"]
    function: _ChosenFunction


ToolChoice = Literal["auto", "none", "required"] | NamedToolChoice


class CalledFunction(StrictBody):
    name: _Name
    arguments: str

    def values(self) -> dict[str, Any] | str:
        """Return the arguments as an object; as they are if they are none, as a model may have written them."""
        try:
            values = from_json(self.arguments or "{}", allow_inf_nan=False)
        except ValueError:
            return self.arguments
        return values if isinstance(values, dict) else self.arguments


class ToolCall(StrictBody):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # of a stream's delta, without effect


ToolCalls = Annotated[list[ToolCall], Field(fail_fast=True)]
