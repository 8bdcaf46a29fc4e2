# SPDX-License-Identifier: Apache-2.0
"""Loading a model directory for a command: engine, tokenizer, sampling defaults."""

import os
import threading
from pathlib import Path

import typer
from tokenizers import Tokenizer

from xgdn import tokenizer_files
from xgdn.cli.failure import fail
from xgdn.engine import Engine, EngineArgs
from xgdn.progress import Bar
from xgdn.sampling_defaults import SamplingDefaults, read_sampling_defaults

_LAST_SECONDS = 6.0  # for requests to end with their error


def load_engine(model: Path, args: EngineArgs) -> Engine:
    """Load a model behind a progress bar."""
    loading = Bar("loading layers")
    try:
        engine = Engine.from_args(model, args, on_layer_loaded=loading.update)
    finally:
        loading.hide()
    engine.on_rank_failure(_end_after_a_rank)
    return engine


def _end_after_a_rank(failure: str) -> None:
    """End the command soon after a rank has ended: what still waits for it by then waits in vain."""
    typer.echo(f"xgdn: {failure}", err=True)
    last = threading.Timer(_LAST_SECONDS, os._exit, args=(1,))
    last.daemon = True
    last.start()


def load_tokenizer(model: Path) -> Tokenizer:
    """Load the tokenizer; end the command where there is none."""
    path = model / "tokenizer.json"
    if not path.is_file():
        fail(f"{path} is missing, so text cannot be read; `xgdn generate` takes token ids with --prompt-ids")
    try:
        return tokenizer_files.load_tokenizer(model)
    except ValueError as error:
        fail(error)


def eos_token_ids(model: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the tokenizer's end-of-sequence ids; end the command where its files are damaged."""
    try:
        return tokenizer_files.eos_token_ids(model, tokenizer)
    except ValueError as error:
        fail(error)


def sampling_defaults(source: str, model: Path) -> SamplingDefaults:
    """Read the sampling defaults of --generation-config and warn of values that are left out."""
    try:
        defaults = read_sampling_defaults(source, model)
    except ValueError as error:
        fail(error)
    for problem in defaults.problems:
        typer.echo(f"xgdn: {problem}", err=True)
    return defaults
