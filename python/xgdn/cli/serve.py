# SPDX-License-Identifier: Apache-2.0
"""`xgdn serve`: the HTTP server."""

import json
import logging
import logging.config
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from xgdn.cli.failure import errors_in_one_line, fail
from xgdn.cli.load import load_engine, load_tokenizer, sampling_defaults
from xgdn.cli.options import MAX, GenerationConfigOption, ModelArgument, with_engine_args
from xgdn.engine import EngineArgs
from xgdn.server.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from xgdn.server.api_keys import ApiKey
    from xgdn.server.serve import Tls

_PREFIX_CACHE_SLOTS = 32  # as many as sequences run at once
_KEY_VARIABLE = "XGDN_API_KEY"
_OTLP_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_log = logging.getLogger("xgdn.server.serve")


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
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help=f"Key that clients of /v1 and /stats must send; repeatable (default: ${_KEY_VARIABLE}, else none).",
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help='JSON list of further keys and their limits: [{"name": ..., "key": ..., "requests_per_minute": ...}].',
        ),
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
        int,
        typer.Option(
            min=0, max=MAX, metavar="N", help="Time for running requests to finish after SIGTERM, in seconds."
        ),
    ] = 30,
    keep_alive_seconds: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="Time without an event after which a stream gets a comment; 0: no comments."
        ),
    ] = Settings.keep_alive_seconds,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Format of the log on stderr; json: an object a line.")
    ] = "text",
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Certificate, in PEM: serve HTTPS."),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="Key of the certificate (default: in its file)."
        ),
    ] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(envvar="XGDN_SSL_KEYFILE_PASSWORD", help="Password of the key's file (default: none).")
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Certificates of authorities, one of which must have signed each client's (default: no check).",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="OpenTelemetry collector to send traces to, by OTLP over HTTP: http://localhost:4318 "
            f"(default: ${_OTLP_VARIABLES[0]}, else none).",
        ),
    ] = None,
    generation_config: GenerationConfigOption = "auto",
    max_stored_responses: Annotated[
        int,
        typer.Option(
            min=0, max=MAX, metavar="N", help="Maximum number of responses of /v1/responses that are kept in memory."
        ),
    ] = Settings.max_stored_responses,
    session_dir: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            metavar="DIR",
            help="Directory where clients save sessions of /v1/sessions and load them from (default: they cannot).",
        ),
    ] = None,
    max_sessions: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Maximum number of open sessions of /v1/sessions.")
    ] = Settings.max_sessions,
    session_idle_seconds: Annotated[
        float,
        typer.Option(min=1, metavar="SECONDS", help="Time without a request after which a session is closed."),
    ] = Settings.session_idle_seconds,
    max_session_files: Annotated[
        int, typer.Option(min=0, max=MAX, metavar="N", help="Maximum number of saved sessions of one key.")
    ] = Settings.max_session_files,
    tool_call_format: Annotated[
        Literal["auto", "hermes", "qwen-xml"],
        typer.Option(help="Format in which the model calls tools; auto: the one that its chat template tells it."),
    ] = "auto",
    reasoning: Annotated[
        Literal["auto", "off"],
        typer.Option(help="auto: thoughts are told apart if the chat template has <think>; off: they are text."),
    ] = "auto",
    *,
    engine_args: EngineArgs,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with the address, once the server accepts requests.")
    ] = False,
) -> None:
    """Serve a model over HTTP with OpenAI's interface: /v1/completions, /v1/chat/completions, /v1/responses.

    Further paths: /health and /ready, /metrics for Prometheus, /openapi.json, and / for a page that shows the engine.
    """
    try:
        from xgdn.server.app import create_app
        from xgdn.server.request_log import logging_config
        from xgdn.server.serve import bind
        from xgdn.server.serve import serve as serve_app
    except ModuleNotFoundError as error:
        fail(f"`xgdn serve` needs {error.name}, which is not installed: pip install 'xgdn[serve]'")

    tokenizer = load_tokenizer(model)
    tls = _tls(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs)
    tracing = _tracing(otlp_endpoint)
    settings = Settings(
        model_dir=model,
        model_name=model_name or model.resolve().name,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        api_keys=_api_keys(api_key or [], api_keys_file),
        keep_alive_seconds=keep_alive_seconds,
        allowed_origins=allow_origin or (),
        max_stored_responses=max_stored_responses,
        session_dir=session_dir,
        max_sessions=max_sessions,
        session_idle_seconds=session_idle_seconds,
        max_session_files=max_session_files,
        tool_call_format=tool_call_format,
        has_reasoning=reasoning == "auto",
        sampling_defaults=sampling_defaults(generation_config, model),
        tracer=tracing.get_tracer("xgdn") if tracing is not None else None,
    )
    try:
        listeners = bind(host, port)  # before the model is loaded, which may take long
    except OSError as error:
        fail(f"{host}:{port}: {error.strerror}")
    with errors_in_one_line():
        engine = load_engine(model, engine_args)
    # Running requests end with their error, and then the server.
    engine.on_rank_failure(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        server_app = create_app(engine, tokenizer, settings)
    except ValueError as error:
        fail(error)
    say: Callable[[str], object] = _print
    if log_format == "json":
        logging.config.dictConfig(logging_config(log_format))
        say = _log.info
    if settings.sampling_defaults.values():
        say(f"requests without them get {settings.sampling_defaults} (generation_config.json)")
    if server_app.state.problem:
        say(f"chat is not served: {server_app.state.problem}")
    announce = _announcement(settings.model_name, listeners, "http" if tls is None else "https", as_json, say)
    try:
        serve_app(server_app, listeners, shutdown_seconds, announce, log_format=log_format, tls=tls)
    except OSError as error:
        fail(f"{host}:{port}: {error.strerror}")
    finally:
        if tracing is not None:
            tracing.shutdown()  # sends what is left
    if engine.device_error:
        fail(engine.device_error)


def _print(message: str) -> None:
    typer.echo(f"xgdn: {message}", err=True)


def _api_keys(keys: Sequence[str], path: Path | None) -> "list[ApiKey]":
    from pydantic import ValidationError

    from xgdn.server.api_keys import ApiKey, check_distinct, read_api_keys

    if not keys and (only := os.environ.get(_KEY_VARIABLE)):
        keys = [only]
    try:
        numbered = [ApiKey(name=f"key-{i}", key=key) for i, key in enumerate(keys, 1)]
    except ValidationError:  # whose message shows the key
        fail("--api-key: expected keys of one or more ASCII characters, without control characters")
    try:
        every = [*numbered, *(read_api_keys(path) if path is not None else [])]
        check_distinct(every)
    except (ValueError, OSError) as error:
        fail(error)
    return every


def _tls(certfile: Path | None, keyfile: Path | None, password: str | None, ca_certs: Path | None) -> "Tls | None":
    from xgdn.server.serve import Tls

    if certfile is None:
        if keyfile is not None or ca_certs is not None:
            fail("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile")
        return None
    tls = Tls(certfile, keyfile, password, ca_certs)
    try:
        tls.check()  # before the model is loaded, which may take long
    except OSError as error:
        fail(f"the certificate {certfile} cannot be used: {error}")
    return tls


def _tracing(endpoint: str | None) -> "TracerProvider | None":
    if endpoint is None and not any(os.environ.get(name) for name in _OTLP_VARIABLES):
        return None
    try:
        from xgdn.server.tracing import start_tracing

        return start_tracing(endpoint)
    except ModuleNotFoundError as error:
        fail(f"traces need {error.name}, which is not installed: pip install 'xgdn[otel]'")


def _announcement(
    model_name: str,
    listeners: Sequence[socket.socket],
    scheme: str,
    as_json: bool,
    say: Callable[[str], object],
) -> Callable[[], None]:
    """What prints the addresses once they are listened on."""
    from xgdn.server.serve import address_of

    def announce() -> None:
        addresses = [address_of(listener, scheme) for listener in listeners]
        if as_json:
            typer.echo(json.dumps({"address": addresses[0], "addresses": addresses, "model": model_name}))
        else:
            say(f"serving {model_name} at {', '.join(addresses)}")

    return announce
