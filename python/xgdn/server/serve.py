# SPDX-License-Identifier: Apache-2.0
"""Runs the application until a signal ends it."""

import copy
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


class _UvicornServer(uvicorn.Server):
    """Ends like a program that did what it was told: uvicorn's own raises the signal again after the shutdown."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError:
            await self.lifespan.shutdown()
            raise
        self._on_listening()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, not yet listening; of a name the first address. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, shutdown_seconds: int, on_listening: Callable[[], None]) -> None:
    """Return after SIGTERM or SIGINT, when the running requests are finished or `shutdown_seconds` are over.

    Raises:
        OSError: another program has begun to listen at the address since `bind`.
    """
    log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"  # stdout is for what was asked for
    config = uvicorn.Config(app, timeout_graceful_shutdown=shutdown_seconds, log_config=log_config)
    _UvicornServer(config, on_listening).run(sockets=[listener])
