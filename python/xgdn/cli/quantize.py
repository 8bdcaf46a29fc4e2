# SPDX-License-Identifier: Apache-2.0
"""`xgdn quantize`: a model directory with weights in 8 or 4 bits."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from xgdn.cli.failure import errors_in_one_line, fail
from xgdn.cli.options import ModelArgument
from xgdn.progress import Bar
from xgdn.quantized_checkpoint import write_quantized


class Format(str, Enum):
    """Formats of weights."""

    INT8 = "int8"
    INT4 = "int4"


def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Directory to write; it must not exist.")],
    format: Annotated[Format, typer.Option(help="Format of the weights.")] = Format.INT8,
) -> None:
    """Write a 16-bit checkpoint with its weights rounded to 8 or 4 bits, as compressed-tensors.

    The weights are those that `--quantize` rounds while a model is loaded, but for the head, which stays as it is.
    """
    if out.exists():
        fail(f"expected a new directory, got {out}, which exists")
    bar = Bar("rounding tensors")
    try:
        with errors_in_one_line():
            write_quantized(model, out, format.value, on_tensor=bar.update)
    except OSError as error:
        fail(error)
    finally:
        bar.hide()
