# SPDX-License-Identifier: Apache-2.0
"""Errors of a command: one line on stderr and exit code 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from xgdn.errors import Error


def fail(message: object) -> NoReturn:
    """End the command with `message`."""
    typer.echo(f"xgdn: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the command with the message of an error of xgdn's or torch's."""
    try:
        yield
    except (Error, RuntimeError) as error:  # RuntimeError: torch's own, such as an allocation that fails
        fail(error)
    except MemoryError as error:
        fail(f"out of memory ({error}); --max-batch-size and --max-cached-tokens size the pools")
