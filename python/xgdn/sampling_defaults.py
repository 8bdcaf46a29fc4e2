# SPDX-License-Identifier: Apache-2.0
"""Sampling defaults from a model's generation_config.json, for requests that do not set a value."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xgdn.tokenizer_files import read_json_object


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of generation_config.json; None for an absent one.

    As in vLLM and SGLang they apply whatever `do_sample` says: a request for greedy decoding sets temperature 0.
    """

    temperature: float | None = None
    top_k: int | None = None  # 0: all tokens
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None  # of an answer whose format has no maximum of its own
    problems: tuple[str, ...] = ()  # invalid values, which are ignored

    def __str__(self) -> str:
        """Return the values as text: `temperature 0.6, top_k 20`."""
        return ", ".join(f"{name} {value:g}" for name, value in self.values().items())

    def values(self) -> dict[str, Any]:
        """Return the values by name, without absent ones."""
        return {name: value for name in _RULES if (value := getattr(self, name)) is not None}

    def without(self, names: Iterable[str]) -> "SamplingDefaults":
        """Return a copy without the values of these names."""
        left_out = set(names)
        return SamplingDefaults(**{name: value for name, value in self.values().items() if name not in left_out})


_Value = TypeVar("_Value", int, float)


def first_given(*values: _Value | None) -> _Value:
    """Return the first value that is not None: of the request, of the model's files, of the program."""
    return next(value for value in values if value is not None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# Name, expected value, check.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number of at least 0", lambda it: _is_number(it) and it >= 0),
    "top_k": (
        "an integer from -1 to 2147483647",
        lambda it: _is_integer(it) and -1 <= it < 2**31,
    ),
    "top_p": ("a number above 0 and at most 1", lambda it: _is_number(it) and 0 < it <= 1),
    "min_p": ("a number from 0 to 1", lambda it: _is_number(it) and 0 <= it <= 1),
    "repetition_penalty": ("a number from 0.01 to 100", lambda it: _is_number(it) and 0.01 <= it <= 100),
    "max_new_tokens": ("an integer from 1 to 2147483647", lambda it: _is_integer(it) and 1 <= it < 2**31),
}


def read_sampling_defaults(source: str, model_dir: Path) -> SamplingDefaults:
    """Read the defaults from `source`: `auto` for the model's directory, `none`, or the path of a file or directory.

    Raises:
        ValueError: the file is damaged, or there is none at the path given.
    """
    if source == "none":
        return SamplingDefaults()
    path = model_dir if source == "auto" else Path(source)
    if path.is_dir():
        path = path / "generation_config.json"
    if source != "auto" and not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    return _parse(read_json_object(path), path)


def _parse(document: Mapping[str, Any], path: Path) -> SamplingDefaults:
    given = {name: document[name] for name in _RULES if document.get(name) is not None}
    good = {name: value for name, value in given.items() if _RULES[name][1](value)}
    problems = tuple(
        f"{path}: {name}: expected {_RULES[name][0]}, got {value!r}; it is left out"
        for name, value in given.items()
        if name not in good
    )
    if good.get("top_k") == -1:  # the same as 0
        good["top_k"] = 0
    return SamplingDefaults(**good, problems=problems)
