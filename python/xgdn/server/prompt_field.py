# SPDX-License-Identifier: Apache-2.0
"""A text, token ids, or a list of either, as completions and embeddings take them."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

PROMPT_TYPE = "prompt_type"  # of the error of a value that is none
_MAX = 2**31 - 1

_TOKENS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1},
    ]
}


def _check(prompt: object) -> object:
    """Check the elements of long lists in C, a few times as fast as pydantic's types do."""
    if isinstance(prompt, str) or are_tokens(prompt):
        return prompt
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        if kinds == {str} or (kinds == {list} and all(map(are_tokens, prompt))):
            return prompt
    raise PydanticCustomError(PROMPT_TYPE, "no prompt")


def are_tokens(ids: object) -> bool:
    """Return whether it is a list of token ids."""
    return isinstance(ids, list) and set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= _MAX))


# str, list[str], list[int] or list[list[int]]
Prompts = Annotated[Any, BeforeValidator(_check), WithJsonSchema(_SCHEMA)]


def each(prompts: Any) -> Sequence[str | list[int]]:
    """Return one entry per prompt: text or token ids."""
    is_one = isinstance(prompts, str) or not prompts or isinstance(prompts[0], int)
    return [prompts] if is_one else prompts
