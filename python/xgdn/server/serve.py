# SPDX-License-Identifier: Apache-2.0
"""Runs the application until a signal ends it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI


class _UvicornServer(uvicorn.Server):
    """Ends like a program that did what it was told: uvicorn's own raises the signal again after the shutdown."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(app: FastAPI, host: str, port: int, shutdown_seconds: int) -> None:
    """Return after SIGTERM or SIGINT, when the running requests are finished or `shutdown_seconds` are over.

    Raises:
        SystemExit: the server could not start, for example because the port is taken; it has said so.
    """
    _UvicornServer(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=shutdown_seconds)).run()
