# SPDX-License-Identifier: Apache-2.0
"""Runs the application until a signal ends it."""

import copy
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

_PORT_ATTEMPTS = 16

_Address = tuple[int, tuple[Any, ...]]  # family, what socket.bind takes


class _UvicornServer(uvicorn.Server):
    """A server that returns after a signal; uvicorn's own raises the signal again after the shutdown."""

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


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI, listeners: Sequence[socket.socket], shutdown_seconds: int, on_listening: Callable[[], None]
) -> None:
    """Return after SIGTERM or SIGINT, when the running requests are finished or `shutdown_seconds` are over.

    Raises:
        OSError: another program has begun to listen at an address since `bind`.
    """
    log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"  # stdout is for the announcement
    config = uvicorn.Config(app, timeout_graceful_shutdown=shutdown_seconds, log_config=log_config)
    _UvicornServer(config, on_listening).run(sockets=list(listeners))
