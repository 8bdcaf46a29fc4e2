# SPDX-License-Identifier: Apache-2.0
"""One engine with the application of `xgdn serve` around it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from ray import serve

from ray_serve.arguments import Arguments
from ray_serve.relay import Message
from ray_serve.route import Route
from ray_serve.versions import check_xgdn
from xgdn.engine import Engine
from xgdn.server.app import create_app
from xgdn.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class ForwardedRequest:
    route: Route
    scope: dict[str, Any]  # of ASGI, as far as it can be sent
    body: bytes


class Replica:
    """Answers requests as `xgdn serve` does. Its `check_health` lets Ray Serve replace it when its engine has stopped.

    Raises:
        RuntimeError: this process has another version of xgdn than the one that deploys.
    """

    async def __init__(self, arguments: Arguments, version: str) -> None:
        self._lifespan = AsyncExitStack()
        check_xgdn(version)
        torch.set_num_threads(arguments.threads)
        engine = Engine.from_args(arguments.model, arguments.engine_args())
        self._app = create_app(engine, load_tokenizer(arguments.model), arguments.settings())
        await self._lifespan.enter_async_context(self._app.router.lifespan_context(self._app))
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __del__(self) -> None:
        await self._lifespan.aclose()

    def check_health(self) -> None:
        if failure := self._app.state.engine.failure:
            raise RuntimeError(f"the engine has stopped: {failure}")

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[str | Message, None]:
        """Yield the name of this replica once it has taken the request, then the messages of the answer."""
        yield self._name
        async with aclosing(self._messages(request)) as messages:
            async for message in messages:
                yield message

    async def metrics(self) -> tuple[str, str]:
        """Return the name of this replica and its text for Prometheus."""
        scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": b"", "headers": []}
        messages = self._messages(ForwardedRequest(Route(), scope, b""))
        return self._name, b"".join([message.get("body", b"") async for message in messages]).decode()

    async def _messages(self, request: ForwardedRequest) -> AsyncGenerator[Message, None]:
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        arriving = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            while not arriving:
                await asyncio.Event().wait()  # a client that leaves cancels the request
            return arriving.pop()

        running = asyncio.create_task(self._app(dict(request.scope), receive, messages.put))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running  # raises what it raised
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
