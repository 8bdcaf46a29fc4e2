# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve`: the HTTP server."""

import json
import socket
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from xgdn.cli.failure import errors_in_one_line, fail
from xgdn.cli.load import load_engine, load_tokenizer, sampling_defaults
from xgdn.cli.options import MAX, GenerationConfigOption, ModelArgument, with_engine_args
from xgdn.engine import EngineArgs
from xgdn.server.settings import Settings

_PREFIX_CACHE_SLOTS = 32  # as many as sequences run at once


@with_engine_args(prefix_cache_slots=_PREFIX_CACHE_SLOTS)
def serve(
    model: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on, or a name that stands for several; 0.0.0.0: all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0: a free one.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model for clients (default: the directory's name).")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="XGDN_API_KEY", help="Key that clients of /v1 must send (default: none).")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin of web pages that may call: http://localhost:3000, or * for all; repeatable (default: none).",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Maximum number of waiting sequences; more are refused.")
    ] = Settings.max_queue,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, max=MAX, metavar="N", help="Maximum request body, in bytes.")
    ] = Settings.max_body_bytes,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Time for running requests to finish after SIGTERM.")
    ] = 30,
    generation_config: GenerationConfigOption = "auto",
    *,
    engine_args: EngineArgs,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with the address, once the server accepts requests.")
    ] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's interface: /v1/completions, /v1/chat/completions, /v1/models.

    Further paths: /health, /metrics for Prometheus, and / for a page that shows the engine and takes a prompt.
    """
    try:
        from xgdn.server.app import create_app
        from xgdn.server.serve import bind
        from xgdn.server.serve import serve as serve_app
    except ModuleNotFoundError as error:
        fail(f"`xgdn serve` needs {error.name}, which is not installed: pip install 'xgdn[serve]'")

    tokenizer = load_tokenizer(model)
    settings = Settings(
        model_dir=model,
        model_name=model_name or model.resolve().name,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        api_key=api_key,
        allowed_origins=allow_origin or (),
        sampling_defaults=sampling_defaults(generation_config, model),
    )
    try:
        listeners = bind(host, port)  # before the model is loaded, which may take long
    except OSError as error:
        fail(f"{host}:{port}: {error.strerror}")
    with errors_in_one_line():
        engine = load_engine(model, engine_args)
    try:
        server_app = create_app(engine, tokenizer, settings)
    except ValueError as error:
        fail(error)
    if settings.sampling_defaults.values():
        typer.echo(f"xgdn: requests without them get {settings.sampling_defaults} (generation_config.json)", err=True)
    if server_app.state.problem:
        typer.echo(f"xgdn: chat is not served: {server_app.state.problem}", err=True)
    try:
        serve_app(server_app, listeners, shutdown_seconds, _announcement(settings.model_name, listeners, as_json))
    except OSError as error:
        fail(f"{host}:{port}: {error.strerror}")


def _announcement(model_name: str, listeners: Sequence[socket.socket], as_json: bool) -> Callable[[], None]:
    """What prints the addresses once they are listened on."""
    from xgdn.server.serve import address_of

    def announce() -> None:
        addresses = [address_of(listener) for listener in listeners]
        if as_json:
            typer.echo(json.dumps({"address": addresses[0], "addresses": addresses, "model": model_name}))
        else:
            typer.echo(f"xgdn: serving {model_name} at {', '.join(addresses)}", err=True)

    return announce
