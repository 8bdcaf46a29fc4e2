# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the values that they take."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from xgdn.engine_args import EngineArgs

MAX = 2**31 - 1  # largest id or count
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

ModelArgument = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Directory with config.json and safetensors.")
]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        metavar="auto|none|PATH",
        help="Source of the default temperature, top_k and top_p; auto: the model's generation_config.json.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def parse_ids(text: str, option: str) -> list[int]:
    """Return the token ids in a text like `1,2,3`."""
    try:
        ids = [int(word) for word in text.split(",")] if text.strip() else []
    except ValueError:
        raise typer.BadParameter(f"expected ids like 1,2,3, got {text!r}", param_hint=option) from None
    if any(abs(token) > MAX for token in ids):
        raise typer.BadParameter(f"expected 32-bit ids, got {text!r}", param_hint=option)
    return ids


def parse_counts(text: str, option: str) -> list[int]:
    """Return the positive numbers in a text like `1,8,32`."""
    counts = parse_ids(text, option)
    if any(count < 1 for count in counts):
        raise typer.BadParameter(f"expected counts like 1,8,32, got {text!r}", param_hint=option)
    return counts


def parse_rates(text: str, option: str) -> list[float]:
    """Return the requests per second in a text like `1,2.5,inf`."""
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(rate > 0 for rate in rates):  # a NaN is not above 0 either
        raise typer.BadParameter(f"expected requests per second like 1,2.5,inf, got {text!r}", param_hint=option)
    return rates


def parse_range(text: str, option: str) -> tuple[int, int]:
    """Return the ends of a range like `32-512`, or twice the number in a text like `64`."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    lowest, highest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= lowest <= highest:
        raise typer.BadParameter(f"expected counts like 32-512 or 64, got {text!r}", param_hint=option)
    return lowest, highest


def parse_bytes(text: str) -> int:
    """Return the number of bytes in a text like `8GiB` or `123456`."""
    match = re.fullmatch(r"(\d{1,15}) ?(KiB|MiB|GiB|TiB|)", text)
    if match is None:
        raise typer.BadParameter(f"expected bytes like 8GiB or 123456, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def readable_bytes(num_bytes: int) -> str:
    """Return a text like `1.50 GiB`."""
    unit = next((unit for unit in reversed(_UNITS) if num_bytes >= _UNITS[unit]), "")
    return f"{num_bytes / _UNITS[unit]:.2f} {unit}" if unit else str(num_bytes)


def _short_name(choice: torch.dtype | str | int) -> str:
    return str(choice).removeprefix("torch.")


def _option(argument: "Field[Any]", default: Any) -> inspect.Parameter:
    """The option of a field of EngineArgs, as a parameter that typer understands."""
    doc, choices = argument.metadata["doc"], argument.metadata["choices"]
    annotation: Any
    if choices:
        names = Enum(argument.name, {name: name for name in map(_short_name, choices)}, type=str)  # type: ignore[misc]
        default = None if default is None else names(_short_name(default))
        annotation = Annotated[names if default is not None else names | None, typer.Option(help=doc)]
    elif argument.name == "memory_limit":
        option = typer.Option(metavar="BYTES", parser=parse_bytes, help=f"{doc} Units: KiB, MiB, GiB, TiB.")
        annotation = Annotated[int | None, option]
    elif argument.type == bool | None:
        name = argument.name.replace("_", "-")
        annotation = Annotated[bool | None, typer.Option(f"--{name}/--no-{name}", help=doc)]
    elif isinstance(default, bool):
        annotation = Annotated[bool, typer.Option(f"--{argument.name.replace('_', '-')}", help=doc)]
    elif isinstance(default, int):
        annotation = Annotated[int, typer.Option(min=0, max=MAX, metavar="N", help=doc)]
    else:
        annotation = Annotated[str, typer.Option(help=doc)]
    return inspect.Parameter(argument.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_engine_args(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `engine_args` of a command by an option for each field of EngineArgs, or for those named.

    The command gets the EngineArgs that the options make. `defaults`: of fields for which it has others.
    """
    arguments = [argument for argument in fields(EngineArgs) if not names or argument.name in names]
    options = [_option(argument, defaults.get(argument.name, argument.default)) for argument in arguments]
    choices = {argument.name: {_short_name(c): c for c in argument.metadata["choices"]} for argument in arguments}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {option.name: given.pop(option.name) for option in options}
            for name, value in values.items():
                if isinstance(value, Enum):
                    values[name] = choices[name][value.value]
            command(engine_args=EngineArgs(**values), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            parameters += options if parameter.name == "engine_args" else [parameter]
        # All are keywords here, so that one with a default may come before one without.
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
