# SPDX-License-Identifier: Apache-2.0
"""Runs the application until a signal ends it."""

import errno
import math
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from xgdn.server.engine_client import EngineClient
from xgdn.server.request_log import logging_config

_PORT_ATTEMPTS = 16
_FLUSH_SECONDS = 1.0  # at least, for the last bytes of answers

_Address = tuple[int, tuple[Any, ...]]  # family, what socket.bind takes


@dataclass(frozen=True)
class Tls:
    """Files of a certificate and of its key, in PEM, as uvicorn names them."""

    certfile: Path
    keyfile: Path | None = None  # None: the certificate's file has both
    keyfile_password: str | None = None
    ca_certs: Path | None = None  # of clients, who must then have a certificate

    def check(self) -> None:
        """Raise OSError where the files cannot be read or do not fit."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password OpenSSL would ask for one at the terminal.
        context.load_cert_chain(self.certfile, self.keyfile, lambda: self.keyfile_password or "")
        if self.ca_certs is not None:
            context.load_verify_locations(self.ca_certs)

    def options(self) -> dict[str, Any]:
        """Return uvicorn's."""
        return {
            "ssl_certfile": self.certfile,
            "ssl_keyfile": self.keyfile,
            "ssl_keyfile_password": self.keyfile_password,
            "ssl_ca_certs": self.ca_certs,
            "ssl_cert_reqs": ssl.CERT_NONE if self.ca_certs is None else ssl.CERT_REQUIRED,
        }


class _UvicornServer(uvicorn.Server):
    """A server that goes on after a signal until its engine has nothing left to do, and then returns.

    In the meantime it listens and refuses new requests, so that a balancer finds out. uvicorn's own closes the port
    first, and raises the signal again at the end.
    """

    def __init__(
        self, config: uvicorn.Config, engine: EngineClient, drain_seconds: float, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._drain_end: float | None = None  # of time.monotonic
        self._on_listening = on_listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._engine.begin_drain()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if not await super().on_tick(counter):
            return False
        now = time.monotonic()
        if self._drain_end is None:
            self._drain_end = now + self._drain_seconds
        if not self._engine.is_idle and now < self._drain_end and not self.force_exit:
            return False
        self._engine.end_all()
        self.config.timeout_graceful_shutdown = math.ceil(max(_FLUSH_SECONDS, self._drain_end - now))
        return True

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


def bind(host: str, port: int) -> list[socket.socket]:
    """Return a socket for every address of this machine that the name stands for, not yet listening.

    All have the same port; with port 0, one that is free at every address.

    Raises:
        OSError: the name is unknown, no address is of this machine, or the port is taken at one of them.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # not a possible host name
        raise OSError(errno.EINVAL, str(error)) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(_PORT_ATTEMPTS if port == 0 else 0):
        try:
            return _bind_all(addresses)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # the port that was free at the first address is taken at another
                raise
    return _bind_all(addresses)


def _bind_all(addresses: Sequence[_Address]) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    absent = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    try:
        for family, (host, port, *rest) in addresses:
            if listeners:
                port = listeners[0].getsockname()[1]
            try:
                listeners.append(_bind_one(family, (host, port, *rest), is_alone=len(addresses) == 1))
            except OSError as error:
                # A name may stand for an address that is not here, such as localhost for ::1 where there is no IPv6.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    if not listeners:
        raise absent
    return listeners


def _bind_one(family: int, address: Sequence[Any], *, is_alone: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_alone:  # else [::] would take the port of 0.0.0.0 too
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(tuple(address))
    except OSError:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(
    app: FastAPI,
    listeners: Sequence[socket.socket],
    shutdown_seconds: int,
    on_listening: Callable[[], None],
    *,
    log_format: str,
    tls: Tls | None,
) -> None:
    """Return after SIGTERM or SIGINT, when the running requests are finished or `shutdown_seconds` are over.

    Raises:
        OSError: another program has begun to listen at an address since `bind`.
    """
    options = {} if tls is None else tls.options()
    config = uvicorn.Config(app, log_config=logging_config(log_format), access_log=False, **options)
    _UvicornServer(config, app.state.engine, shutdown_seconds, on_listening).run(sockets=list(listeners))
