# SPDX-License-Identifier: Apache-2.0
"""The command line: `xgdn generate`, `serve`, `plan`, `quantize`, `bench` and `doctor`."""

import importlib.metadata
from typing import Annotated

import typer

from xgdn.cli import bench, doctor, generate, plan, quantize, serve

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Serves models with the gated delta rule (Qwen3-Next, Qwen3.5)."
)
for command in (generate.generate, plan.plan, quantize.quantize, serve.serve, doctor.doctor):
    app.command()(command)
app.add_typer(bench.app, name="bench")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"xgdn {importlib.metadata.version('xgdn')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
